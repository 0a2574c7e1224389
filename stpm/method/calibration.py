"""Calibration on held-out good images: scales of distance maps, p-values, the threshold and the heatmap scale."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stpm.errors import join_first

Floats = npt.NDArray[np.floating]

log = logging.getLogger(__name__)

# A heatmap begins at this quantile of held-out images' pixels, and ends at this multiple of the range from there to the
# largest of them.
_HEATMAP_QUANTILE = 0.99
_HEATMAP_RANGES = 5.0
# Quantiles of distances that become 0 and 1.
_DISTANCE_QUANTILES = (0.9, 0.995)
# Distances that hardly vary on good images would outweigh all others: their spread is at least this fraction of `high`.
_MIN_SPREAD = 0.05


@dataclass(frozen=True)
class HeatmapScale:
    """The fixed range of a model's heatmaps, in units of the anomaly map, low < good_max.

    `low` is the 99th percentile of held-out images' pixels, `good_max` the largest pixel of these images and of those
    that were added to the calibration. Grey level 0 is `low` and below. Level 128 is `good_max` for every model: none
    of these images has a larger pixel. Levels rise linearly up to `good_max`, then with the logarithm; five times as
    far above `low` as `good_max`, and beyond, is level 255.

    >>> HeatmapScale(low=1.0, good_max=2.0).apply(np.array([0.5, 1.0, 1.5, 2.0, 6.0, 9.0]))
    array([  0,   0,  64, 128, 255, 255], dtype=uint8)
    """

    low: float
    good_max: float

    def apply(self, anomaly_map: Floats) -> npt.NDArray[np.uint8]:
        """Convert a map of any shape to grey levels 0 to 255."""
        excess = (anomaly_map - self.low) / (self.good_max - self.low)
        beyond = 1 + np.log(np.clip(excess, 1.0, _HEATMAP_RANGES)) / np.log(_HEATMAP_RANGES)
        levels = np.round(127.5 * np.where(excess < 1, np.maximum(excess, 0.0), beyond))
        return np.asarray(levels, np.uint8)


@dataclass(frozen=True)
class DistanceScale:
    """Quantiles of a distance map on held-out images: fusion maps `low` (0.9) to 0 and `high` (0.995) to 1."""

    low: float
    high: float

    @property
    def spread(self) -> float:
        """Return high − low, kept above 0 where distances hardly vary."""
        return max(self.high - self.low, _MIN_SPREAD * abs(self.high), 1e-6)


def fit_distance_scale(values: Sequence[Floats]) -> DistanceScale:
    """Return the scale of a distance map, given its values on each held-out image, one image or more."""
    # Do not interpolate: the same images twice have the same quantiles, and equal images score the same.
    low, high = np.quantile(np.concatenate(values), _DISTANCE_QUANTILES, method="inverted_cdf")
    return DistanceScale(float(low), float(high))


def leave_one_out_scales(values: Sequence[Floats]) -> list[DistanceScale]:
    """Return, for each of two or more held-out images, the scale that `fit_distance_scale` gives for the others.

    An image that contributes to its own scale looks better than any later image.
    """
    pooled = np.concatenate(values)
    order = np.argsort(pooled, kind="stable")
    ordered = pooled[order]
    ranks_in_order = np.empty(len(pooled), np.int64)
    ranks_in_order[order] = np.arange(len(pooled))
    ends = np.cumsum([len(distances) for distances in values])
    scales = []
    for own in np.split(ranks_in_order, ends[:-1]):
        # Number of values of other images before each of this image's values.
        others_before = np.sort(own) - np.arange(len(own))
        ranks = [max(math.ceil((len(pooled) - len(own)) * quantile - 1), 0) for quantile in _DISTANCE_QUANTILES]
        low, high = ordered[ranks + np.searchsorted(others_before, ranks, side="right")]
        scales.append(DistanceScale(float(low), float(high)))
    return scales


@dataclass(frozen=True)
class Calibration:
    """The scores of a model's n calibration images, ascending float32, and its heatmap scale.

    >>> calibration = Calibration(np.array([1, 2, 3, 4], np.float32), HeatmapScale(0.0, 1.0))
    >>> calibration.p_values(np.array([0.5, 2.5, 9.0], np.float32))
    array([1. , 0.6, 0.2], dtype=float32)
    >>> calibration.threshold(false_alarm_rate=0.4)
    3.0
    """

    scores: npt.NDArray[np.float32]
    scale: HeatmapScale

    def p_values(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Compute the conformal p-value of each score: p = (1 + #{calibration scores ≥ s}) / (n + 1), in (0, 1].

        See Vovk et al., Algorithmic Learning in a Random World, section 2.2.
        """
        n = len(self.scores)
        at_least = n - np.searchsorted(self.scores, scores, side="left")
        return ((1 + at_least) / (n + 1)).astype(np.float32)

    def threshold(self, false_alarm_rate: float) -> float:
        """Return the threshold of the model, see `threshold`."""
        return threshold(self.scores, false_alarm_rate)


def threshold(scores: npt.NDArray[np.float32], false_alarm_rate: float) -> float:
    """Return the smallest of n calibration scores, (n,) ascending, above which every score has p ≤ the rate.

    On average, at most this fraction of good images that are exchangeable with the calibration images scores higher. n
    images support no rate below 1/(n+1): for a lower one, return the largest calibration score.
    """
    return float(scores[-threshold_rank(len(scores), false_alarm_rate)])


def threshold_rank(count: int, false_alarm_rate: float) -> int:
    """Return the rank, 1 for the largest, of the score that is the threshold of `count` calibration images.

    >>> threshold_rank(199, 0.01)
    2
    """
    # The small term keeps a product that should be whole from being rounded down.
    return min(max(int(false_alarm_rate * (count + 1) + 1e-9), 1), count)


def min_calibration_images(false_alarm_rate: float) -> int:
    """Return the number of calibration images that a rate needs: the smallest n with 1/(n+1) ≤ the rate.

    >>> min_calibration_images(0.01)
    99
    """
    return math.ceil(1 / false_alarm_rate - 1 - 1e-9)


def warn_about_few_good_images(counts: Mapping[str, tuple[int, int]], false_alarm_rate: float) -> None:
    """Log a warning that names the models with too few calibration images for a rate, if there are any.

    Args:
        counts: number of good images, and of those that calibrate the model, by category.
        false_alarm_rate: in (0, 1).
    """
    needed = min_calibration_images(false_alarm_rate)
    few = [
        f"{name} calibrates on {count} of its {good} good images, which supports a rate of "
        f"{1 / (count + 1):.3f} or more"
        for name, (good, count) in counts.items()
        if count < needed
    ]
    if few:
        log.warning(
            f"--false-alarm-rate {false_alarm_rate:g} needs {needed} good images to calibrate on: "
            f"{join_first(few)}. Raise --false-alarm-rate, or give at least {needed} good images and fit with "
            "--calibration-folds 5, so that all of them calibrate. Until then their threshold is the largest score of "
            "a good image"
        )


class HeatmapScaleBuilder:
    """Compute the exact heatmap scale of many maps, added one at a time.

    It keeps only the largest one percent of all pixels, about 20 bytes for each of them.

    Args:
        pixels: number of pixels of all maps together, at least one.
    """

    def __init__(self, pixels: int) -> None:
        self._position = _HEATMAP_QUANTILE * (pixels - 1)
        self._max_kept = pixels - math.floor(self._position)
        self._kept: list[npt.NDArray[np.float32]] = []
        self._kept_count = 0
        self._min_kept = -math.inf

    def add(self, anomaly_map: npt.NDArray[np.float32]) -> None:
        """Add a map of any shape."""
        self._kept.append(anomaly_map[anomaly_map >= self._min_kept])
        self._kept_count += len(self._kept[-1])
        if self._kept_count > 2 * self._max_kept:
            self._drop_smallest()

    def build(self) -> HeatmapScale:
        """Return the scale of all maps; `low` is interpolated linearly between two pixels, as `numpy.quantile` does."""
        ordered = np.sort(self._drop_smallest())
        below, above = ordered[0], ordered[min(1, len(ordered) - 1)]
        weight = self._position - math.floor(self._position)
        low = float(below + (above - below) * weight if weight < 0.5 else above - (above - below) * (1 - weight))
        # Constant maps have a scale too: float32 distinguishes low from its sum with this step.
        step = max(1e-6 * abs(low), 1e-30)
        return HeatmapScale(low, max(float(ordered[-1]), low + step))

    def _drop_smallest(self) -> npt.NDArray[np.float32]:
        pixels = np.concatenate(self._kept)
        if len(pixels) > self._max_kept:
            pixels.partition(len(pixels) - self._max_kept)
            pixels = pixels[-self._max_kept :].copy()
            self._min_kept = pixels[0]
        self._kept, self._kept_count = [pixels], len(pixels)
        return pixels
