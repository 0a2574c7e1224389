"""Scales of maps, from held-out good images: the range of heatmaps, and the unit of each distance map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

# Processes that read a model's record do not import torch.
if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.floating]

# Grey level 0 is this quantile of held-out images' pixels, and 255 is this many times as far above it as the largest of
# them.
_HEATMAP_QUANTILE = 0.99
_LOGARITHMIC_UNTIL = 5.0
# The grey level of the largest of them.
GOOD_MAX_LEVEL = 128
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

    @property
    def top(self) -> float:
        """Return the smallest value of level 255."""
        return self.low + _LOGARITHMIC_UNTIL * (self.good_max - self.low)

    def apply(self, anomaly_map: Floats) -> npt.NDArray[np.uint8]:
        """Convert a map of any shape to grey levels 0 to 255; NaN becomes 0."""
        import torch

        levels: npt.NDArray[np.uint8] = self.levels(torch.tensor(anomaly_map)).numpy()
        return levels

    def levels(self, maps: Tensor) -> Tensor:
        """Convert maps as `apply` does, on their device: to uint8."""
        linear = maps.nan_to_num(self.low).sub_(self.low).div_(self.good_max - self.low)
        logarithmic = linear.clamp(1.0, _LOGARITHMIC_UNTIL).log_().div_(math.log(_LOGARITHMIC_UNTIL))
        return logarithmic.add_(linear.clamp_(0.0, 1.0)).mul_(127.5).round_().byte()


class HeatmapScaleBuilder:
    """Compute the exact heatmap scale of many maps, added one at a time, with this many pixels together, at least one.

    It keeps only the largest one percent of all pixels, about 20 bytes for each of them.
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


@dataclass(frozen=True)
class DistanceScale:
    """Quantiles of a distance map on held-out images: fusion maps `low` (0.9) to 0 and `high` (0.995) to 1."""

    low: float
    high: float

    @property
    def spread(self) -> float:
        """Return high − low, kept above 0 where distances hardly vary."""
        return max(self.high - self.low, _MIN_SPREAD * abs(self.high), 1e-6)

    def to(self, other: DistanceScale) -> tuple[float, float]:
        """Return factor and summand that bring distances of this scale to another's."""
        factor = other.spread / self.spread
        return factor, other.low - factor * self.low


def fit_distance_scale(values: Sequence[Floats]) -> DistanceScale:
    """Return the scale of a distance map, given its values on each held-out image, one image or more."""
    # Do not interpolate: the same images twice have the same quantiles, and equal images score the same.
    low, high = np.quantile(np.concatenate(values), _DISTANCE_QUANTILES, method="inverted_cdf")
    return DistanceScale(float(low), float(high))


def fit_scales(samples: Sequence[Floats], weights: Floats) -> tuple[DistanceScale, ...]:
    """Return the scales of K distance maps and, if there are two, of V views.

    Args:
        samples: of each held-out image, values of the maps at the same positions, (K, P); one image or more.
        weights: (V, K), of the maps in each view.
    """
    maps = tuple(map(fit_distance_scale, zip(*samples, strict=True)))
    return maps + _view_scales(samples, weights, maps)


def leave_one_out_scales(samples: Sequence[Floats], weights: Floats) -> list[tuple[DistanceScale, ...]]:
    """Return, for each of two or more held-out images, the scales that `fit_scales` gives for the others.

    An image that contributes to its own scales looks better than any later image.
    """
    of_maps = zip(*(_leave_one_out(values) for values in zip(*samples, strict=True)), strict=True)
    return [maps + _view_scales([*samples[:i], *samples[i + 1 :]], weights, maps) for i, maps in enumerate(of_maps)]


def _view_scales(
    samples: Sequence[Floats], weights: Floats, maps: Sequence[DistanceScale]
) -> tuple[DistanceScale, ...]:
    if len(weights) == 1:
        return ()
    low, spread = np.array([(scale.low, scale.spread) for scale in maps], np.float32).T
    pooled = np.concatenate(samples, axis=1)
    views = (weights / spread) @ pooled - (weights @ (low / spread))[:, None]
    scales = (fit_distance_scale([view]) for view in views)
    # They are in units of their maps' spread already: a value near 0 is no measure of it.
    return tuple(DistanceScale(each.low, max(each.high, each.low + _MIN_SPREAD)) for each in scales)


def _leave_one_out(values: Sequence[Floats]) -> list[DistanceScale]:
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
