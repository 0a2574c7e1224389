"""The threshold that a category's images were judged by, and what its calibration images promise of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stpm.method.calibration import expected_false_alarm_rate, false_alarm_bound


@dataclass(frozen=True)
class Threshold:
    """A threshold among a model's calibration scores.

    >>> threshold = Threshold.among(2.0, np.array([1, 2, 3], np.float32))
    >>> threshold.source, threshold.expected_false_alarm_rate
    ('2nd of 3 good', 0.5)

    Args:
        value: scores above it are anomalous; NaN where no image was scored.
        rank: one more than there are calibration scores above it, so that 1 is the largest of them.
        count: number of calibration images.
    """

    value: float
    rank: int
    count: int

    @classmethod
    def among(cls, value: float, scores: npt.NDArray[np.float32]) -> Threshold:
        """Find the place of a threshold among calibration scores (n,), whoever set it."""
        return cls(value, 1 + int((scores > np.float32(value)).sum()), len(scores))

    @property
    def source(self) -> str:
        """Say where the threshold comes from."""
        if self.rank > self.count:
            return f"below all {self.count} good"
        if self.rank == 1:
            return f"largest of {self.count} good"
        ordinal = {1: "st", 2: "nd", 3: "rd"}.get(self.rank % 10 if self.rank % 100 not in (11, 12, 13) else 0, "th")
        return f"{self.rank}{ordinal} of {self.count} good"

    @property
    def expected_false_alarm_rate(self) -> float:
        """Return the fraction of new good images above it, on average over calibration sets: 1/(n+1) or more."""
        return expected_false_alarm_rate(self.count, self.rank)

    @property
    def false_alarm_bound(self) -> float:
        """Return the fraction that nine of ten calibration sets keep to."""
        return false_alarm_bound(self.count, self.rank) if self.rank <= self.count else 1.0

    def row(self) -> dict[str, float | int | str]:
        """Make its columns of report.parquet."""
        return {
            "threshold": self.value,
            "threshold_rank": self.rank,
            "threshold_source": self.source,
            "expected_false_alarm_rate": self.expected_false_alarm_rate,
            "false_alarm_bound": self.false_alarm_bound,
        }
