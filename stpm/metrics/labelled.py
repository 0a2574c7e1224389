"""One category's labelled scores, and the counts of its pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import numpy as np
import numpy.typing as npt

from stpm.data.mvtec import GOOD
from stpm.errors import UndefinedMetricError
from stpm.metrics.intervals import Flags, Scores
from stpm.metrics.pixels import PixelCounts


@dataclass(frozen=True)
class LabelledScores:
    """The scored images of one category that have a label.

    Args:
        labels: (N,), "good" or a defect type.
        scores: (N,), larger is more anomalous.
        is_anomalous: (N,), true above the threshold.
        threshold: of the model; NaN without images.
        pixels: pixel counts by label.
        no_pixels: why there are no pixel counts, or "".
        error_count: number of images with a label that could not be scored.
        unlabelled_count: number of images without a label.
        vanished_masks: URIs of masks whose defects are too small for the anomaly map: no pixel metric counts them.
        problems: one line each.
    """

    labels: npt.NDArray[np.str_]
    scores: Scores
    is_anomalous: Flags
    threshold: float
    pixels: Mapping[str, PixelCounts]
    no_pixels: str
    error_count: int
    unlabelled_count: int
    vanished_masks: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def is_defect(self) -> Flags:
        """True for a defect, (N,)."""
        return np.asarray(self.labels != GOOD)

    @property
    def defect_types(self) -> list[str]:
        """The labels of defects, sorted."""
        return sorted({*self.labels.tolist()} - {GOOD})

    def pixel_counts(self) -> PixelCounts:
        """Add up the counts over all labels.

        Raises:
            UndefinedMetricError: if there are none.
        """
        if self.no_pixels:
            raise UndefinedMetricError(self.no_pixels)
        return reduce(add, self.pixels.values(), PixelCounts.empty())

    def of_defect(self, defect_type: str) -> LabelledScores:
        """Select one defect type and all good images."""
        chosen = np.isin(self.labels, (GOOD, defect_type))
        return replace(
            self,
            labels=self.labels[chosen],
            scores=self.scores[chosen],
            is_anomalous=self.is_anomalous[chosen],
            pixels={label: counts for label, counts in self.pixels.items() if label in (GOOD, defect_type)},
        )
