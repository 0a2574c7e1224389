"""Make the record of a night: count its rows, judge its categories, draw images, and find discoveries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from stpm import storage
from stpm.method.false_discovery import Discoveries, find_discoveries
from stpm.models.store import ModelStore
from stpm.monitoring.drift import Reference, Sample
from stpm.monitoring.judging import judge_categories
from stpm.monitoring.night_folder import NightFolder
from stpm.monitoring.nights import CategoryRecord, Night
from stpm.monitoring.options import MonitoringOptions
from stpm.monitoring.references import ModelReference, choose_models, load_references
from stpm.monitoring.rows import RowCounter, read_rows
from stpm.monitoring.significance import FloatArray
from stpm.monitoring.top_images import top_images
from stpm.scoring.output import RunOutput
from stpm.scoring.row_summary import RowSummary
from stpm.scoring.written_rows import committed_summaries


def make_record(
    folder: NightFolder,
    night: Night,
    earlier: Sequence[Night],
    store: ModelStore,
    options: MonitoringOptions,
    false_alarm_rate: float,
) -> Night:
    """Make the record of a night from its rows.

    A night with a problem, or with images that have no row yet, is not judged: missing images look like a change.

    Args:
        folder: of the night.
        night: its date, sources and problem.
        earlier: the nights before it, oldest first.
        store: the models.
        options: the number of nights, and the rates of false verdicts and discoveries.
        false_alarm_rate: of a night without runs; otherwise its first run requested one.

    Returns:
        The record. It has a problem if storage failed while a model was read.

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
    models = choose_models(rows, outputs, () if night.problem or unfinished else earlier[-options.nights :])
    references, problem = load_references(store, models)
    rate = _requested_rate(outputs, false_alarm_rate)
    counters = {name: rows.get(name) or RowCounter() for name in models}
    samples = {name: counter.sample() for name, counter in counters.items()}
    categories = {
        name: _category_record(counters[name], samples[name], models[name], references[name].reference, rate)
        for name in models
    }
    night = replace(night, unfinished=unfinished, problem=night.problem or problem)
    if not night.problem and not unfinished:
        categories = judge_categories(replace(night, categories=categories), samples, references, earlier, options)
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
    rates = [output.state.false_alarm_rate() for output in outputs]
    return next((rate for rate in rates if rate is not None), default)


def _category_record(
    rows: RowCounter, sample: Sample, model_id: str, reference: Reference | None, false_alarm_rate: float
) -> CategoryRecord:
    """Make the record of a category, without a verdict."""
    return CategoryRecord(
        model_id=model_id,
        images=rows.images,
        alarms=rows.alarms,
        errors=dict(rows.errors.most_common()),
        false_alarm_rate=false_alarm_rate,
        median_p_value=float(np.median(sample.p_values)) if len(sample.p_values) else None,
        medians=_medians(sample.statistics),
        training_medians=_medians(reference.statistics) if reference else {},
    )


def _medians(values: Mapping[str, FloatArray]) -> dict[str, float]:
    return {name: float(np.median(numbers)) for name, numbers in values.items() if len(numbers)}


def _discoveries(
    outputs: Iterable[RunOutput], references: Mapping[str, ModelReference], rate: float
) -> Discoveries | None:
    """Find the discoveries among the images of all runs, without those whose model can no longer be read."""
    if not rate:
        return None
    segments = (summary for output in outputs for summary in committed_summaries(output))
    calibration = {name: model.reference.calibration_count for name, model in references.items() if model.reference}
    counts = RowSummary.total(segments, 0).p_values
    return find_discoveries({name: counts[name] for name in counts if name in calibration}, calibration, rate)
