"""Bring the records of several nights up to date: count each night's rows, judge its categories, draw images."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache

import numpy as np

from stpm import storage
from stpm.errors import (
    ConfigError,
    DataError,
    ModelDamagedError,
    ModelError,
    ModelUnreadableError,
    with_remedy,
)
from stpm.line.night import CategoryNight, Night, TopImage
from stpm.line.night_folder import NightFolder
from stpm.line.rows import RowCounter, read_rows
from stpm.line.score_nights import NightlyJob
from stpm.line.significance import FloatArray
from stpm.line.verdict import EARLIER, Reference, judge_categories
from stpm.method.calibration import promised_rates
from stpm.method.preprocessing import Preprocessing
from stpm.models.store import ModelStore
from stpm.names import as_utf8
from stpm.scoring.kinds import Row, group_alarms
from stpm.scoring.output import RunOutput
from stpm.scoring.ranked_rows import most_anomalous
from stpm.scoring.triage import THREADS, picture

_TOP_IMAGES = 12

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
                nights[date] = night = _update_record(job, folder, earlier, problem)
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


def _update_record(job: NightlyJob, folder: NightFolder, earlier: Sequence[Night], problem: str) -> Night:
    """Return the night's record, made anew if rows were added since it was written or it was not judged."""
    night = folder.read()
    if night and night.is_judged and night.runs == tuple(output.name for output in folder.manifests()):
        return replace(night, problem=problem)
    return make_record(job, folder, earlier, problem)


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
        loaded = storage.in_parallel(lambda name: _load_reference(job.store, name, models[name]), list(models))
        references = dict(zip(models, loaded, strict=True))
    except ModelUnreadableError as error:
        # Storage failed: the next start judges the night.
        references = dict.fromkeys(models, Reference(problem=as_utf8(str(error))))
        problem = problem or as_utf8(str(error))
    # What the first run requested.
    configs = (output.state.record.config for output in outputs)
    rate = next((config.false_alarm_rate for config in configs if config), job.scoring.false_alarm_rate)
    counters = {name: rows.get(name) or RowCounter() for name in models}
    samples = {name: counter.sample() for name, counter in counters.items()}
    categories = {}
    for name, counter in counters.items():
        (p_values, statistics), reference = samples[name], references[name]
        categories[name] = CategoryNight(
            model_id=models[name],
            images=counter.images,
            alarms=counter.alarms,
            errors=dict(counter.errors.most_common()),
            false_alarm_rate=reference.decided_rate if reference.decision else rate,
            decision=reference.decision,
            median_p_value=float(np.median(p_values)) if len(p_values) else None,
            medians=_medians(statistics),
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
        top=_top_images(outputs, job.store, max(job.monitoring.top, _TOP_IMAGES)),
        pages=tuple(output.name for output in outputs if storage.exists(output.triage)),
    )
    if problem or unfinished:
        return night
    return replace(night, categories=judge_categories(night, samples, references, earlier, job.monitoring))


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


def _top_images(outputs: Sequence[RunOutput], store: ModelStore, count: int) -> tuple[TopImage, ...]:
    """Select one image of each kind among a night's most anomalous ones, then others; draw each with its heatmap."""
    found = [row | {"output": output} for output in outputs for row in most_anomalous(output, count)]
    found = sorted(found, key=lambda row: (row["margin"], row["uri"]), reverse=True)[:count]

    @cache
    def preprocessing(category: str, model_id: str) -> Preprocessing:
        return store.record(category, model_id).preprocessing

    def draw(kind: Sequence[Row]) -> TopImage:
        row, drawn = kind[0], ""
        with suppress(ModelError):
            drawn = picture(row["output"], row, preprocessing(row["category"], row["model_id"]))
        values = {name: row[name] for name in ("uri", "category", "score", "threshold", "p_value", "is_anomalous")}
        return TopImage(**values, picture=drawn, alike=len(kind))

    return tuple(storage.in_parallel(draw, group_alarms(found)[:_TOP_IMAGES], THREADS))
