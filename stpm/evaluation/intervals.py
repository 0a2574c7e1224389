"""95 % intervals of image-level figures: how far another test set of this size may have moved them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from stpm.evaluation.metrics import Flags, Scores, require_both_classes, require_some

Interval = tuple[float, float]

CONFIDENCE = 0.95
_DRAWS = 2000
# Of draws times distinct scores that are computed at once.
_AT_ONCE = 2**20


def bootstrapped(is_defect: Flags, scores: Scores, seed: int = 0) -> dict[str, Interval]:
    """Percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13).

    Good and defective images are each drawn anew among themselves, as often as there are. Where no good image scores
    above a defect no draw can change that, and the interval has no width.

    Args:
        is_defect: (N,), true for a defect.
        scores: (N,), larger for what is more anomalous.
        seed: of the draws; the same for every category, so that a report can be made again.

    Returns:
        Intervals of AUROC, average precision and F1-max, by those names.

    Raises:
        UndefinedMetricError: as the metrics do.
    """
    require_both_classes(is_defect, scores)
    rng = np.random.default_rng(seed)
    _, places = np.unique(-scores, return_inverse=True)
    share = {flag: np.bincount(places[is_defect == flag], minlength=places.max() + 1) for flag in (False, True)}
    many = max(1, _AT_ONCE // len(share[True]))
    found: list[tuple[npt.NDArray[np.float64], ...]] = []
    for start in range(0, _DRAWS, many):
        draws = min(many, _DRAWS - start)
        good, defect = (rng.multinomial(of.sum(), of / of.sum(), draws) for of in (share[False], share[True]))
        found.append(_figures(good, defect))
    names = ("auroc", "average_precision", "f1_max")
    return {name: _ends(np.concatenate(values)) for name, values in zip(names, zip(*found, strict=True), strict=True)}


def of_share(chosen: Flags, of: str) -> Interval:
    """Interval of a share of images (Wilson 1927): it has a width even where none or all are chosen.

    Raises:
        UndefinedMetricError: if there is none; `of` says of what.
    """
    require_some(chosen, of)
    interval = binomtest(int(chosen.sum()), chosen.size).proportion_ci(CONFIDENCE, "wilson")
    return float(interval.low), float(interval.high)


def _figures(good: npt.NDArray[np.int64], defect: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float64], ...]:
    """AUROC, average precision and F1-max of each row: (draws, K) images by score, the largest first."""
    fp, tp = np.cumsum(good, axis=1), np.cumsum(defect, axis=1)
    all_good, defects = fp[:, -1:], tp[:, -1:]
    above = tp + fp
    auroc = (defect * (all_good - fp + good / 2)).sum(axis=1) / (all_good * defects)[:, 0]
    precision = tp / np.maximum(above, 1)
    return auroc, (defect / defects * precision).sum(axis=1), (2 * tp / (defects + above)).max(axis=1)


def _ends(values: npt.NDArray[np.float64]) -> Interval:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
