"""AUROC, average precision, F1-max and AUPRO of pixels, from a state that does not grow with the number of images.

It counts pixels by key: a float32 score, read as an integer of the same order. It is exact while the distinct keys are
few. When they exceed a limit, drop the last bit of all keys, and repeat until they do not: neighbouring scores tie. The
number of lost bits depends only on the set of scores, so that states may be merged in any order and grouping.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from stpm.errors import UndefinedMetricError
from stpm.metrics.intervals import RANK_METRICS, metrics_of_counts

# Errors on real maps are near 2e-5, and the state takes a few megabytes.
MAX_KEYS = 2**17

Map = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Curve = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]

_EIGHT_CONNECTED = np.ones((3, 3), int)


@dataclass(frozen=True)
class PixelCounts:
    """Numbers of good and of defective pixels by score.

    Args:
        keys: (K,) uint32, ascending: order-preserving bits of the score, without the last `lost_bits`.
        sums: (3, K) float64: numbers of good and of defective pixels, which are exact up to 2^53; and the sum over
            defect regions of the fraction of each region's pixels.
    """

    keys: npt.NDArray[np.uint32]
    sums: npt.NDArray[np.float64]
    regions: int
    lost_bits: int = 0
    max_keys: int = MAX_KEYS

    @staticmethod
    def empty() -> PixelCounts:
        """Make the counts of no image."""
        return count_pixels([], [])

    def __add__(self, other: PixelCounts) -> PixelCounts:
        """Add up the counts of two sets of images."""
        lost_bits = max(self.lost_bits, other.lost_bits)
        one, two = self._with_lost_bits(lost_bits), other._with_lost_bits(lost_bits)
        keys, sums = np.concatenate([one.keys, two.keys]), np.concatenate([one.sums, two.sums], axis=1)
        return PixelCounts(keys, sums, one.regions + two.regions, lost_bits, self.max_keys)._merged()

    def rank_metrics(self) -> dict[str, float]:
        """Compute RANK_METRICS over pixels."""
        good, defect, _ = self._descending()
        return dict(zip(RANK_METRICS, metrics_of_counts(good[None], defect[None])[:, 0].tolist(), strict=True))

    def aupro(self, limit: float) -> float:
        """Compute the area under the per-region-overlap curve up to a false positive rate, divided by it.

        At a threshold, the per-region overlap is the mean over defect regions of the fraction of the region's pixels
        above it (Bergmann et al., The MVTec Anomaly Detection Dataset, section 5.2); the rate is that of pixels
        outside every region. The curve is linear between thresholds.

        Args:
            limit: largest false positive rate, in (0, 1].
        """
        x, y = self.pro_curve(limit)
        return float(np.trapezoid(y, x)) / limit

    def roc_curve(self) -> Curve:
        """Compute false positive rate and recall over pixels, both ascending from 0 to 1."""
        good, defect, _ = self._descending()
        return _curve(good / good.sum()), _curve(defect / defect.sum())

    def pro_curve(self, limit: float) -> Curve:
        """Compute what `aupro` integrates: false positive rate and per-region overlap, both ascending from 0."""
        good, _, overlap = self._descending()
        x, y = _curve(good / good.sum()), _curve(overlap / self.regions)
        inside = int(np.searchsorted(x, limit, side="right"))
        return np.append(x[:inside], limit), np.append(y[:inside], np.interp(limit, x, y))

    def _descending(self) -> npt.NDArray[np.float64]:
        good, defect, _ = self.sums
        if not defect.any():
            raise UndefinedMetricError("no defective pixels")
        if not good.any():
            raise UndefinedMetricError("no good pixels")
        return self.sums[:, ::-1]

    def _with_lost_bits(self, lost_bits: int) -> PixelCounts:
        if lost_bits == self.lost_bits:
            return self
        return replace(self, keys=self.keys >> np.uint32(lost_bits - self.lost_bits), lost_bits=lost_bits)._merged()

    def _merged(self) -> PixelCounts:
        """Add up the sums of equal keys, and drop bits of the keys until they are few enough."""
        distinct, inverse = np.unique(self.keys, return_inverse=True)
        sums = np.stack([np.bincount(inverse, each, len(distinct)).astype(np.float64) for each in self.sums])
        counts = replace(self, keys=distinct, sums=sums)
        return counts if len(distinct) <= self.max_keys else counts._with_lost_bits(self.lost_bits + 1)


def count_pixels(maps: Sequence[Map] | Map, masks: Sequence[Mask] | Mask, max_keys: int = MAX_KEYS) -> PixelCounts:
    """Count the pixels of some anomaly maps and masks, (H, W) each, as lists or as arrays (N, H, W).

    Regions are 8-connected and never cross images. Pixels whose score is NaN are not inspected, and not counted.

    Raises:
        UndefinedMetricError: if a score is infinite.

    Three of four pairs of a good and a defective pixel are in order:

    >>> counts = count_pixels([np.array([[0.1, 0.5, 0.3, 0.7]], np.float32)], [np.array([[False, False, True, True]])])
    >>> counts.rank_metrics()["auroc"]
    0.75
    """
    for anomaly_map, mask in zip(maps, masks, strict=True):
        if anomaly_map.shape != mask.shape:
            raise ValueError(f"map {anomaly_map.shape} and mask {mask.shape} differ in shape")
    scores = _joined(maps, np.float32)
    if np.isinf(scores).any():
        raise UndefinedMetricError("a score is infinite")
    inspected = ~np.isnan(scores)
    if not inspected.all():
        masks = [mask & ~np.isnan(anomaly_map) for anomaly_map, mask in zip(maps, masks, strict=True)]
    weights, regions = zip(*map(_region_weights, masks), strict=True) if len(masks) > 0 else ((), ())
    defect = _joined(masks, np.bool_)
    sums = np.stack([~defect, defect, _joined(weights, np.float64)])[:, inspected]
    return PixelCounts(_ordered_bits(scores[inspected]), sums, sum(regions), max_keys=max_keys)._merged()


def _ordered_bits(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """Turn scores into unsigned integers of the same order; the two zeros become one."""
    bits = (scores.astype(np.float32, copy=False) + np.float32(0)).view(np.uint32)
    negative = (bits >> np.uint32(31)).astype(bool)
    ordered: npt.NDArray[np.uint32] = np.where(negative, ~bits, bits | np.uint32(1 << 31))
    return ordered


def _region_weights(mask: Mask) -> tuple[npt.NDArray[np.float64], int]:
    """Return one over the size of its region for every pixel, 0 outside; and the number of regions."""
    labels, found = ndimage.label(mask, _EIGHT_CONNECTED)
    weights = np.zeros(mask.shape)
    if found:
        sizes = np.bincount(labels.ravel())
        weights[mask] = 1 / sizes[labels[mask]]
    return weights, int(found)


def _joined(arrays: Iterable[npt.NDArray[Any]], kind: type) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, kind), *(array.ravel() for array in arrays)])


def _curve(steps: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(steps)])
