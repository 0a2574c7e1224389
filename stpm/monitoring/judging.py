"""Judge each category of a night against its model and earlier nights."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from stpm.monitoring.change import Change
from stpm.monitoring.drift import Counts, Sample, Verdict, judge
from stpm.monitoring.nights import CategoryRecord, Night
from stpm.monitoring.options import MonitoringOptions
from stpm.monitoring.references import ModelReference


def judge_categories(
    records: Mapping[str, CategoryRecord],
    samples: Mapping[str, Sample],
    references: Mapping[str, ModelReference],
    earlier: Sequence[Night],
    options: MonitoringOptions,
) -> dict[str, CategoryRecord]:
    """Return the categories of a night with their verdicts.

    Args:
        records: of all categories of the night, without verdicts.
        samples: of each category's rows with a score.
        references: of each category's model.
        earlier: the nights before.
        options: the number of nights, and the rate of false verdicts.
    """
    tests, rate = len(records) * options.nights, options.false_verdict_rate
    judged = {}
    for name, record in records.items():
        past = _judged_nights(earlier, name)
        verdict = _judge_category(record, samples[name], references[name], past, tests=tests, false_verdict_rate=rate)
        judged[name] = replace(record, verdict=verdict)
    return judged


def _judged_nights(earlier: Iterable[Night], category: str) -> dict[datetime.date, Counts]:
    """Return the earlier nights of a category that were judged: from the others, images may be missing."""
    found = [(night.day, night.categories.get(category)) for night in earlier]
    return {date: record for date, record in found if record and record.verdict}


def _judge_category(
    record: CategoryRecord,
    sample: Sample,
    model: ModelReference,
    earlier: Mapping[datetime.date, Counts],
    *,
    tests: int,
    false_verdict_rate: float,
) -> Verdict:
    """Judge a category's night by `drift.judge`; images whose model cannot be read are a reason to act."""
    if record.images and model.problem:
        return Verdict("act", (Change("model", "act", p_value=0.0, size=1.0, text=model.problem),))
    return judge(record, sample, earlier, model.reference, tests=tests, false_verdict_rate=false_verdict_rate)
