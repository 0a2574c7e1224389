"""Bring the records of several nights up to date: count each night's rows, and judge its categories."""

from __future__ import annotations

import datetime
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stpm import storage
from stpm.data.image_statistics import COMPARED
from stpm.errors import ConfigError, DataError, ModelDamagedError, ModelUnreadableError, with_remedy
from stpm.line.night import CategoryNight, Night
from stpm.line.night_folder import NightFolder
from stpm.line.score_nights import NightlyJob
from stpm.line.significance import FloatArray
from stpm.line.verdict import EARLIER, Reference, Sample, judge
from stpm.method.calibration import promised_rates
from stpm.models.store import ModelStore
from stpm.names import as_utf8
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import read_batches
from stpm.scoring.schema import OUTPUT

# Images of a category whose p-values and statistics are compared: enough for any change that matters.
SAMPLE = 5000
_EXAMPLES_OF_A_KIND = 3
# Rows that are counted at a time. A file may have a few hundred rows, of as many categories.
_BATCH = 100_000
_SAMPLED = ["image_id", "p_value", *COMPARED]
# Of `Night.error_examples`, and the columns that have them.
_EXAMPLE = {"kind": "error_kind", "category": "category", "uri": "uri", "message": "error_message"}
_COLUMNS = [*_SAMPLED, "model_id", "is_anomalous", *_EXAMPLE.values()]

log = logging.getLogger(__name__)


def update_records(
    job: NightlyJob, dates: Sequence[datetime.date], problems: Mapping[datetime.date, str]
) -> dict[datetime.date, Night]:
    """Bring the records of these nights, oldest first, up to date; return all records that matter, by date."""
    count = max(job.monitoring.nights, EARLIER)
    folders = NightFolder.find_all(job.out)
    before = [folder for folder in folders if folder.date < dates[0]][-count:]
    nights = _read({*before, *(folder for folder in folders[-count:] if folder.date not in dates)})
    for date in dates:
        folder, problem = NightFolder.of(job.out, date), problems.get(date, "")
        if folder not in folders and date != dates[-1] and not problem:
            continue
        earlier = [nights[day] for day in sorted(nights) if day < date][-count:]
        try:
            with with_remedy(folder.how_to_start_over):
                night = folder.read()
                # It is made anew if rows were added since it was written, or it was not judged.
                if night and night.is_judged and night.runs == tuple(output.name for output in folder.manifests()):
                    night = replace(night, problem=problem)
                else:
                    night = make_record(job, folder, earlier, problem)
            nights[date] = night
            # Write no record for a day without images: --date may be mistyped.
            if folder in folders or night.categories or night.problem:
                folder.write(night)
        except (ConfigError, DataError, OSError) as error:
            # Storage failed, or the record or a file of the runs is damaged: keep the record.
            nights[date] = job.empty_night(date, as_utf8(str(error)))
            log.error(f"{date}: {nights[date].problem}")
    return nights


def _read(folders: Iterable[NightFolder]) -> dict[datetime.date, Night]:
    nights = {}
    for folder in folders:
        try:
            if night := folder.read():
                nights[folder.date] = night
        except (DataError, OSError) as error:
            log.warning(f"{as_utf8(str(error))}; the page leaves this night out")
    return nights


def make_record(job: NightlyJob, folder: NightFolder, earlier: Sequence[Night], problem: str) -> Night:
    """Make the record of a night from its rows, given those of the nights before it, oldest first.

    A night with a problem, or with images that have no row yet, is not judged: missing images look like a change. It
    also has a problem if storage failed while a model was read.

    Raises:
        ConfigError, DataError: if files of a run are damaged.
    """
    manifests = folder.manifests()
    outputs = list(manifests)
    rows, error_examples = read_rows(outputs)
    listed = sum(manifest.rows for manifest in manifests.values())
    unfinished = max(listed - sum(counter.images for counter in rows.values()), 0)
    # A judged night also judges categories without images tonight, by the model of the last night on the page that has
    # scored some.
    models = _choose_models(rows, outputs, () if problem or unfinished else earlier[-job.monitoring.nights :])
    try:
        loaded = storage.in_parallel(lambda name: _load_reference(job.store, name, models[name]), models)
        references = dict(zip(models, loaded, strict=True))
    except ModelUnreadableError as error:
        # Storage failed: the next start judges the night.
        references = dict.fromkeys(models, Reference(problem=as_utf8(str(error))))
        problem = problem or as_utf8(str(error))
    # What the first run requested.
    configs = (output.state.record.config for output in outputs)
    rate = next((config.false_alarm_rate for config in configs if config), job.scoring.false_alarm_rate)
    samples, categories = {}, {}
    for name, model_id in models.items():
        counter, reference = rows.get(name) or RowCounter(), references[name]
        samples[name] = counter.sample()
        medians = _medians(samples[name])
        categories[name] = CategoryNight(
            model_id=model_id,
            images=counter.images,
            alarms=counter.alarms,
            errors=dict(counter.errors.most_common()),
            false_alarm_rate=reference.decided_rate if reference.decision else rate,
            decision=reference.decision,
            median_p_value=medians.pop("p_value", None),
            medians=medians,
            training_medians=_medians(reference.statistics),
        )
    night = Night(
        folder.date.isoformat(),
        job.sources(folder.date),
        runs=tuple(output.name for output in outputs),
        unfinished=unfinished,
        problem=problem,
        categories=categories,
        error_examples=error_examples,
        pages=tuple(output.name for output in outputs if storage.exists(output.triage)),
    )
    if problem or unfinished:
        return night
    judged = {n: judge(night, n, samples[n], references[n], earlier, job.monitoring) for n in categories}
    return replace(night, categories=judged)


def _choose_models(
    rows: Mapping[str, RowCounter], outputs: Iterable[RunOutput], earlier: Iterable[Night]
) -> dict[str, str]:
    """Return the id of each category's model, by name in order; "" if it has none.

    It is the model that scored most of the category's rows; without any, that of the latest run or night that has one.
    """
    models = dict.fromkeys(rows, "")
    for night in earlier:
        models |= {name: category.model_id for name, category in night.categories.items() if category.scored}
    for output in outputs:
        models |= output.state.record.models or {}
    models |= {name: counter.models.most_common(1)[0][0] for name, counter in rows.items() if counter.models}
    return dict(sorted(models.items()))


def _load_reference(store: ModelStore, category: str, model_id: str) -> Reference:
    """Read the good images of a category's model.

    Raises:
        ModelUnreadableError: if storage failed.
    """
    if not model_id:
        what = "no model scored its images" if category else "images without a category, which no model scores"
        return Reference(problem=what)
    try:
        record = store.record(category, model_id)
        table = store.image_statistics(record)
        calibration = store.calibration_scores(record)
        scores, is_added = (calibration[name].to_numpy() for name in ("score", "is_added"))
    except ModelDamagedError as error:
        return Reference(problem=f"its model cannot be read: {error}")
    statistics = {name: table[name].to_numpy() for name in table.column_names}
    decided_rate = promised_rates(scores, record.decision.threshold)[0] if record.decision else 0.0
    added = np.flatnonzero(is_added[::-1]) + 1.0
    return Reference(len(is_added), statistics, added, str(record.decision or ""), decided_rate)


def _medians(values: Mapping[str, FloatArray]) -> dict[str, float]:
    return {name: float(np.median(numbers)) for name, numbers in values.items() if len(numbers)}


class RowCounter:
    """Counts and samples one category's rows. They are added a batch at a time, in any order.

    The sample is the rows with the smallest image ids. An id is a hash: the sample is random, and the same after a run
    was cut off.
    """

    def __init__(self) -> None:
        self.images = self.alarms = 0
        self.errors, self.models = Counter[str](), Counter[str]()
        self._sampled = [pa.schema(map(OUTPUT.field, _SAMPLED)).empty_table()]

    def add(self, rows: pa.Table) -> None:
        """Add rows of this category."""
        scored = rows.filter(pc.field("error_kind") == "")
        self.images += rows.num_rows
        self.alarms += pc.sum(scored["is_anomalous"]).as_py() or 0
        self.errors.update(rows.filter(pc.field("error_kind") != "")["error_kind"].to_pylist())
        self.models.update(scored["model_id"].to_pylist())
        self._sampled.append(scored.select(_SAMPLED))
        if sum(each.num_rows for each in self._sampled) > 2 * SAMPLE:
            self._sampled = [self._smallest_ids()]

    def sample(self) -> Sample:
        """Return the p-values and statistics of the sampled images."""
        rows = self._smallest_ids()
        return {name: rows[name].to_numpy() for name in ("p_value", *COMPARED)}

    def _smallest_ids(self) -> pa.Table:
        return pa.concat_tables(self._sampled).sort_by("image_id").slice(0, SAMPLE)


def read_rows(outputs: Iterable[RunOutput]) -> tuple[Mapping[str, RowCounter], tuple[dict[str, str], ...]]:
    """Count and sample the rows of a night.

    Returns:
        The counts and samples by category, and a few examples of each kind of error, as `Night` has them.

    Raises:
        DataError: if a file of rows is damaged.
    """
    categories: defaultdict[str, RowCounter] = defaultdict(RowCounter)
    examples: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    for rows in _tables(outputs):
        ordered, start = rows.sort_by("category"), 0
        for counted in pc.value_counts(ordered["category"]).to_pylist():
            categories[counted["values"]].add(ordered.slice(start, counted["counts"]))
            start += counted["counts"]
        failed = rows.filter(pc.field("error_kind") != "").select([*_EXAMPLE.values()]).rename_columns([*_EXAMPLE])
        for kind in pc.unique(failed["kind"]).to_pylist():
            wanted = _EXAMPLES_OF_A_KIND - len(examples[kind])
            examples[kind] += failed.filter(pc.field("kind") == kind).slice(0, wanted).to_pylist()
    return categories, tuple(example for kind in sorted(examples) for example in examples[kind])


def _tables(outputs: Iterable[RunOutput]) -> Iterator[pa.Table]:
    waiting: list[pa.RecordBatch] = []
    for batch in chain.from_iterable(read_batches(output, _COLUMNS) for output in outputs):
        waiting.append(batch)
        if sum(each.num_rows for each in waiting) >= _BATCH:
            yield pa.Table.from_batches(waiting)
            waiting = []
    if waiting:
        yield pa.Table.from_batches(waiting)
