"""Count the rows of a night, and judge each of its categories against its model and earlier nights."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from stpm import storage
from stpm.errors import ModelError, ModelUnreadableError
from stpm.method.false_discovery import Discoveries, find_discoveries
from stpm.models.store import ModelStore
from stpm.monitoring.change import Change
from stpm.monitoring.drift import CategoryNight, Reference, Verdict, judge
from stpm.monitoring.night_folder import NightFolder
from stpm.monitoring.nights import CategoryRecord, Night
from stpm.monitoring.options import MonitoringOptions
from stpm.monitoring.rows import CategoryRows, read_rows
from stpm.monitoring.significance import FloatArray
from stpm.monitoring.top_images import top_images
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
    false_alarm_rate = _requested_rate(outputs, false_alarm_rate)
    unfinished = _count_unfinished(outputs, by_category.values())
    # If the night is judged, then also a category that has no images tonight, by its model of an earlier night.
    models = _choose_models(by_category, outputs, () if night.problem or unfinished else earlier)
    references, problem = _load_references(store, models)
    night = replace(night, unfinished=unfinished, problem=night.problem or problem)
    tests = len(models) * options.nights
    categories = {}
    for name, model_id in models.items():
        rows = by_category.get(name) or CategoryRows()
        record = _count_category(rows, model_id, references[name], false_alarm_rate)
        if not night.problem and not unfinished:
            nights = [*_judged_nights(earlier, name), _as_category_night(folder.date, record, *rows.sample())]
            verdict = _judge_category(nights, references[name], tests, options.false_verdict_rate)
            record = replace(record, verdict=verdict)
        categories[name] = record
    return replace(
        night,
        runs=tuple(output.name for output in outputs),
        pages=tuple(output.name for output in outputs if storage.exists(output.triage)),
        categories=categories,
        error_examples=error_examples,
        top=top_images(outputs, store),
        discoveries=_discoveries(outputs, references, options.fdr),
    )


def _requested_rate(outputs: Iterable[RunOutput], default: float) -> float:
    """Return the false-alarm rate that the first run requested."""
    rates = [RunState(output.state_folder).false_alarm_rate() for output in outputs]
    return next((rate for rate in rates if rate is not None), default)


def _count_unfinished(outputs: Iterable[RunOutput], categories: Iterable[CategoryRows]) -> int:
    """Count the images that the manifests list and that have no row."""
    listed = sum(images.rows for output in outputs if (images := manifest.read(output.manifest)))
    return max(listed - sum(rows.images for rows in categories), 0)


def _choose_models(
    by_category: Mapping[str, CategoryRows], outputs: Iterable[RunOutput], earlier: Iterable[Night]
) -> dict[str, str]:
    """Return the id of each category's model, by name in order; "" if it has none.

    It is the model that scored most of the category's rows; without any, that of the latest run or night that has one.
    """
    scored = {name: rows.models.most_common(1)[0][0] for name, rows in by_category.items() if rows.models}
    models = dict.fromkeys(by_category, "") | _latest_models(earlier) | _bound_models(outputs) | scored
    return dict(sorted(models.items()))


def _load_references(store: ModelStore, models: Mapping[str, str]) -> tuple[dict[str, Reference | str], str]:
    """Read the good images of each category's model, or why there are none.

    Returns:
        Both by category, and the problem if storage failed: then no category has good images, and the next start judges
        the night.
    """
    try:
        found = storage.in_parallel(lambda name: _reference(store, name, models[name]), list(models))
    except ModelUnreadableError as error:
        return dict.fromkeys(models, ""), as_utf8(str(error))
    return dict(zip(models, found, strict=True)), ""


def _count_category(
    rows: CategoryRows, model_id: str, reference: Reference | str, false_alarm_rate: float
) -> CategoryRecord:
    """Make the record of a category's rows, without a verdict."""
    p_values, statistics = rows.sample()
    return CategoryRecord(
        model_id=model_id,
        images=rows.images,
        alarms=rows.alarms,
        errors=dict(rows.errors.most_common()),
        false_alarm_rate=false_alarm_rate,
        median_p_value=float(np.median(p_values)) if len(p_values) else None,
        medians=_medians(statistics),
        training_medians={} if isinstance(reference, str) else _medians(reference.statistics),
    )


def _judged_nights(earlier: Iterable[Night], category: str) -> list[CategoryNight]:
    """Return the earlier nights of a category that were judged: from the others, images may be missing."""
    found = [(night.day, night.categories.get(category)) for night in earlier]
    # The counts are enough: images are compared with the model's alone.
    return [_as_category_night(date, record, np.empty(0), {}) for date, record in found if record and record.verdict]


def _judge_category(
    nights: Sequence[CategoryNight], reference: Reference | str, tests: int, false_verdict_rate: float
) -> Verdict:
    """Judge the last of a category's nights by `drift.judge`; images whose model cannot be read are a reason to act."""
    if isinstance(reference, str):
        if nights[-1].images:
            return Verdict("act", (Change("model", "act", p_value=0.0, size=1.0, text=reference),))
        return judge(nights, None, tests=tests, false_verdict_rate=false_verdict_rate)
    return judge(nights, reference, tests=tests, false_verdict_rate=false_verdict_rate)


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
    records = (item for night in earlier for item in night.categories.items())
    return {name: record.model_id for name, record in records if record.scored}


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
    return {name: float(np.median(numbers)) for name, numbers in values.items() if len(numbers)}


def _as_category_night(
    date: datetime.date, record: CategoryRecord, p_values: FloatArray, statistics: Mapping[str, FloatArray]
) -> CategoryNight:
    """Make an input of `drift.judge` from counts and a sample of the images."""
    return CategoryNight(
        model_id=record.model_id,
        images=record.images,
        alarms=record.alarms,
        errors=record.errors,
        false_alarm_rate=record.false_alarm_rate,
        date=date,
        p_values=p_values,
        statistics=statistics,
    )
