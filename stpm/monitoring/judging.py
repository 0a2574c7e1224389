"""Judge each category of a night against its model and earlier nights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from stpm.monitoring.change import Change
from stpm.monitoring.drift import Sample, Verdict, judge
from stpm.monitoring.nights import CategoryRecord, Night
from stpm.monitoring.options import MonitoringOptions
from stpm.monitoring.references import ModelReference

# Nights with which a night is compared: thirteen weeks, from which it shows how much the same weekdays differ.
EARLIER = 91


def judge_categories(
    night: Night,
    samples: Mapping[str, Sample],
    references: Mapping[str, ModelReference],
    earlier: Sequence[Night],
    options: MonitoringOptions,
) -> dict[str, CategoryRecord]:
    """Return the categories of a night with their verdicts. Images whose model cannot be read are a reason to act.

    Args:
        night: with all its categories, without verdicts.
        samples: of each category's rows with a score.
        references: of each category's model.
        earlier: the nights before, of which the last `EARLIER` are compared.
        options: the number of nights, and the rate of false verdicts.
    """
    records = night.categories
    tests, rate = len(records) * options.nights, options.false_verdict_rate
    is_idle = sum(not record.images for record in records.values()) > len(records) / 2 and len(records) > 1
    judged = {}
    for name, record in records.items():
        model = references[name]
        if record.images and model.problem:
            change = Change("model", "act", p_value=0.0, size=1.0, text=model.problem)
            verdict = Verdict("act", (change,))
        else:
            # Images may be missing from nights that were not judged.
            past = {n.day: each for n in earlier[-EARLIER:] if (each := n.categories.get(name)) and each.verdict}
            verdict = judge(
                record,
                samples[name],
                past,
                model.reference,
                date=night.day,
                is_idle=is_idle,
                tests=tests,
                false_verdict_rate=rate,
            )
        judged[name] = replace(record, verdict=verdict)
    return judged
