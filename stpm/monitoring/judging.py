"""Count the rows of a night, and judge each of its categories against its model and earlier nights."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from stpm import storage
from stpm.errors import ModelError, ModelUnreadableError
from stpm.method.false_discovery import Discoveries, find_discoveries
from stpm.method.preprocessing import Preprocessing
from stpm.models.store import ModelStore
from stpm.monitoring.change import Change
from stpm.monitoring.drift import CategoryNight, Reference, Verdict, judge
from stpm.monitoring.nights import CategoryRecord, Night
from stpm.monitoring.options import MonitoringOptions
from stpm.monitoring.rows import CategoryRows, read_rows, top_images
from stpm.monitoring.runs import NightFolder
from stpm.names import as_utf8
from stpm.scoring.inputs import manifest
from stpm.scoring.output import RunOutput
from stpm.scoring.resuming.run_state import RunState
from stpm.scoring.resuming.segments import committed_summaries
from stpm.scoring.row_summary import RowSummary


def judge_night(
    folder: NightFolder,
    night: Night,
    earlier: Sequence[Night],
    store: ModelStore,
    options: MonitoringOptions,
    false_alarm_rate: float,
) -> Night:
    """Count a night's rows, judge its categories, and draw its most anomalous images.

    A night with a problem, or with images that have no row yet, is not judged: missing images look like a change.

    Args:
        folder: of the night.
        night: its record, without counts and verdicts.
        earlier: the nights before it, oldest first.
        store: the models.
        options: the number of nights, and the rates of false verdicts and discoveries.
        false_alarm_rate: of a night without runs; otherwise its first run requested one.

    Returns:
        The record. It has a problem if storage failed while a model was read.

    Raises:
        ConfigError, DataError: if files of a run are damaged.
    """
    outputs = folder.outputs_with_manifest()
    by_category, error_examples = read_rows(outputs)
    rates = [rate for output in outputs if (rate := RunState(output.state_folder).false_alarm_rate()) is not None]
    false_alarm_rate = next(iter(rates), false_alarm_rate)
    listed = sum(each.rows for output in outputs if (each := manifest.read(output.manifest)))
    unfinished = max(listed - sum(each.images for each in by_category.values()), 0)
    known = ({} if night.problem or unfinished else _latest_models(earlier)) | _bound_models(outputs)
    names = sorted({*by_category, *known})
    rows = {name: by_category.get(name) or CategoryRows() for name in names}
    models = {name: next(iter(rows[name].models.most_common(1)), (known.get(name, ""), 0))[0] for name in names}
    try:
        found_references = storage.in_parallel(lambda name: _reference(store, name, models[name]), names)
        references = dict(zip(names, found_references, strict=True))
    except ModelUnreadableError as error:
        # The next start judges the night.
        night = replace(night, problem=night.problem or as_utf8(str(error)))
        references = dict.fromkeys(names, "")
    tests = max(len(names), 1) * options.nights

    def make_record(name: str) -> CategoryRecord:
        counted, reference = rows[name], references[name]
        p_values, statistics = counted.sample()
        record = CategoryRecord(
            models[name],
            counted.images,
            counted.alarms,
            dict(counted.errors.most_common()),
            false_alarm_rate,
            float(np.median(p_values)) if len(p_values) else None,
            _medians(statistics),
            {} if isinstance(reference, str) else _medians(reference.statistics),
        )
        if night.problem or unfinished:
            return record
        if isinstance(reference, str) and counted.images:
            return replace(record, verdict=Verdict("act", (Change("model", "act", 0.0, 1.0, reference),)))
        # Images may be missing from a night that was not judged.
        before = [
            _as_category_night(each.day, counts)
            for each in earlier
            if (counts := each.categories.get(name)) and counts.verdict
        ]
        this = replace(_as_category_night(folder.date, record), p_values=p_values, statistics=statistics)
        good = None if isinstance(reference, str) else reference
        verdict = judge([*before, this], good, tests=tests, false_verdict_rate=options.false_verdict_rate)
        return replace(record, verdict=verdict)

    return replace(
        night,
        runs=tuple(output.name for output in outputs),
        pages=tuple(output.name for output in outputs if storage.exists(output.triage)),
        unfinished=unfinished,
        categories={name: make_record(name) for name in names},
        error_examples=error_examples,
        top=top_images(outputs, _preprocessing(store)),
        discoveries=_discoveries(outputs, references, options.fdr),
    )


def _discoveries(
    outputs: Iterable[RunOutput], references: Mapping[str, Reference | str], rate: float
) -> Discoveries | None:
    """Find the discoveries among the images of all runs, without those whose model can no longer be read."""
    if not rate:
        return None
    segments = (summary for output in outputs for summary in committed_summaries(output))
    calibration = {
        name: reference.calibration_count for name, reference in references.items() if isinstance(reference, Reference)
    }
    counts = RowSummary.total(segments, 0).p_values
    return find_discoveries({name: counts[name] for name in counts if name in calibration}, calibration, rate)


def _bound_models(outputs: Iterable[RunOutput]) -> dict[str, str]:
    """Return the id of each category's model in the latest run that has one."""
    bound: dict[str, str] = {}
    for output in outputs:
        bound |= RunState(output.state_folder).model_ids() or {}
    return bound


def _latest_models(earlier: Iterable[Night]) -> dict[str, str]:
    """Return the latest model of each category that had scores on one of the earlier nights."""
    return {name: each.model_id for night in earlier for name, each in night.categories.items() if each.scored}


def _reference(store: ModelStore, category: str, model_id: str) -> Reference | str:
    """Return the good images of a category's model, or why there are none.

    Raises:
        ModelUnreadableError: if storage failed.
    """
    if not model_id:
        return "no model scored its images" if category else "images without a category, which no model scores"
    try:
        record = store.record(category, model_id)
        table = store.image_statistics(record)
        is_added = store.calibration_scores(record)["is_added"].to_numpy()
    except ModelUnreadableError:
        raise
    except ModelError as error:
        return f"its model cannot be compared with: {error}"
    statistics = {name: table[name].to_numpy() for name in table.column_names}
    return Reference(len(is_added), statistics, np.flatnonzero(is_added[::-1]) + 1.0)


def _medians(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(np.median(each)) for name, each in values.items() if len(each)}


def _as_category_night(date: datetime.date, record: CategoryRecord) -> CategoryNight:
    """Make an input of `drift.judge` from counts alone."""
    counts = (record.model_id, record.images, record.alarms, record.errors, record.false_alarm_rate)
    return CategoryNight(*counts, date, np.empty(0), {})


def _preprocessing(store: ModelStore) -> Callable[[str, str], Preprocessing]:
    return cache(lambda category, model_id: store.record(category, model_id).preprocessing)
