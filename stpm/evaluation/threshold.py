"""Where the threshold of a category is among the scores of its calibration images, and what they promise of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stpm.method.calibration import count_far, promised_rates, spreads_above
from stpm.metrics.intervals import Scores
from stpm.models.record import Decision


class Threshold(NamedTuple):
    """A threshold, as report.parquet has it; without values where no image was scored.

    Args:
        threshold: scores above it are anomalous.
        threshold_rank: one more than there are calibration scores above it: 1 is the largest of them.
        threshold_source: where it comes from, in words.
        expected_false_alarm_rate: fraction of new good images above it, on average over calibration sets.
        false_alarm_bound: the fraction that nine of ten calibration sets keep to.
        far_count: calibration images whose scores are far above the others'.
    """

    threshold: float | None = None
    threshold_rank: int | None = None
    threshold_source: str = ""
    expected_false_alarm_rate: float | None = None
    false_alarm_bound: float | None = None
    far_count: int | None = None


def place_threshold(value: float, scores: Scores, decision: Decision | None = None) -> Threshold:
    """Find the place of a threshold, whoever set it, among n calibration scores; NaN: no image was scored.

    >>> place_threshold(2.0, np.array([1, 2, 3], np.float32))[:4]
    (2.0, 2, '2nd of 3 good', 0.5)
    """
    if np.isnan(value):
        return Threshold()
    count, rank = len(scores), 1 + int((scores > np.float32(value)).sum())
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(0 if rank % 100 in (11, 12, 13) else rank % 10, "th")
    source = f"{'largest' if rank == 1 else f'{rank}{suffix}'} of {count} good"
    if decision:
        source = f"set by {decision.by}"
    return Threshold(value, rank, source, *promised_rates(scores, value), count_far(spreads_above(scores)))
