"""Calibration on good images: p-values and the threshold, from scores of images that the model was not fitted on."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stpm.errors import join_first
from stpm.method.scales import HeatmapScale

# A good image lies far out from so many spreads on: of real products one in a hundred (bench/RESULTS-quality.md). Fewer
# images have no upper quartile.
FAR, MIN_IMAGES = 6.0, 10
# A spread is at least this fraction of the median.
_MIN_SPREAD = 0.02

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """The scores of a model's n calibration images, ascending float32, and its heatmap scale.

    `max_pixels` are the largest pixels of their anomaly maps, ascending; p-values need none.

    >>> calibration = Calibration(np.array([1, 2, 3, 4], np.float32), HeatmapScale(0.0, 1.0))
    >>> calibration.p_values(np.array([0.5, 2.5, 9.0], np.float32))
    array([1. , 0.6, 0.2], dtype=float32)
    """

    scores: npt.NDArray[np.float32]
    scale: HeatmapScale
    max_pixels: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))

    def p_values(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Compute the conformal p-value of each score: p = (1 + #{calibration scores ≥ s}) / (n + 1), in (0, 1].

        See Vovk et al., Algorithmic Learning in a Random World, section 2.2.
        """
        n = len(self.scores)
        at_least = n - np.searchsorted(self.scores, scores, side="left")
        return ((1 + at_least) / (n + 1)).astype(np.float32)

    def pixel_threshold(self, region_rate: float) -> float:
        """Return the value above which at most this fraction of good images has a pixel; see `threshold`."""
        return threshold(self.max_pixels, region_rate)


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


def expected_false_alarm_rate(count: int, rank: int) -> float:
    """Return the fraction of new good images that score above the rank-th largest of `count` calibration scores.

    It is the mean over calibration sets: for one set the fraction follows Beta(rank, count + 1 - rank), if good images
    are exchangeable (Vovk, Conditional validity of inductive conformal predictors, 2012).

    >>> expected_false_alarm_rate(199, 2)
    0.01
    """
    return rank / (count + 1)


def false_alarm_bound(count: int, rank: int, confidence: float = 0.9) -> float:
    """Return the fraction of false alarms that a calibration set's own fraction exceeds in 1 - confidence of all sets.

    It is a quantile of the distribution that `expected_false_alarm_rate` is the mean of.

    >>> round(false_alarm_bound(99, 1), 4)
    0.023
    """
    # Where no rate is promised, SciPy is not imported, which takes a part of a second of every process.
    from scipy.special import betaincinv

    return float(betaincinv(rank, count + 1 - rank, confidence))


def promised_rates(scores: npt.NDArray[np.float32], threshold: float) -> tuple[float, float]:
    """Return `expected_false_alarm_rate` and `false_alarm_bound` of any threshold: those of the largest score below it.

    >>> promised_rates(np.array([1, 2, 3], np.float32), 2.5)[0], promised_rates(np.array([1], np.float32), 0.5)
    (0.5, (1.0, 1.0))
    """
    rank = 1 + int((scores > np.float32(threshold)).sum())
    bound = false_alarm_bound(len(scores), rank) if rank <= len(scores) else 1.0
    return expected_false_alarm_rate(len(scores), rank), bound


def describe_promise(scores: npt.NDArray[np.float32], threshold: float) -> str:
    """Say how many of a model's calibration scores, (n,), are above a threshold, and how many alarms follow."""
    expected, bound = (round(1000 * rate) for rate in promised_rates(scores, threshold))
    return (
        f"{(scores > threshold).sum()} of {len(scores)} calibration images are above {threshold:.4g}: of 1,000 good "
        f"images expect at most {expected}, and in 9 of 10 cases at most {bound}"
    )


def spreads_above(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return how far values of good images, (N,), are above their median, where the upper quartile is one spread."""
    middle, upper = np.quantile(values, [0.5, 0.75])
    spread = max(upper - middle, _MIN_SPREAD * abs(middle), np.finfo(np.float32).tiny)
    spreads: npt.NDArray[np.float32] = ((values - middle) / spread).astype(np.float32)
    return spreads


def count_far(spreads: npt.NDArray[np.float32]) -> int:
    """Count the images that lie far out, by `spreads_above`; 0 of fewer than ten."""
    return int((spreads > FAR).sum()) if len(spreads) >= MIN_IMAGES else 0


def log_normal_limit(scores: npt.NDArray[np.float32], false_alarm_rate: float) -> float:
    """Return the threshold for a rate that n scores, (n,) ascending, two or more, are too few for.

    It is the upper prediction limit of one more score, if the distances of scores from a point below the smallest are
    log-normal (Hahn and Meeker, Statistical Intervals, section 4.8). bench/RESULTS-quality.md compares it with others.
    """
    from scipy.special import stdtrit

    n, median = len(scores), float(np.median(scores))
    start = float(scores[0]) - 0.5 * (median - float(scores[0])) - 1e-6
    logs = np.log(scores.astype(np.float64) - start)
    width = stdtrit(n - 1, 1 - false_alarm_rate) * logs.std(ddof=1) * math.sqrt(1 + 1 / n)
    return float(np.exp(logs.mean() + width) + start)


def min_calibration_images(false_alarm_rate: float) -> int:
    """Return the number of calibration images that a rate needs: the smallest n with 1/(n+1) ≤ the rate.

    >>> min_calibration_images(0.01)
    99
    """
    return math.ceil(1 / false_alarm_rate - 1 - 1e-9)


def warn_about_few_good_images(counts: Mapping[str, tuple[int, int]], false_alarm_rate: float) -> None:
    """Log a warning that names the models with too few calibration images for a rate, if there are any.

    `counts` are the good images of each category, and how many of them calibrate its model.
    """
    needed = min_calibration_images(false_alarm_rate)
    few = [
        f"{name} calibrates on {count} of its {good} good images, which supports a rate of "
        f"{1 / (count + 1):.3f} or more"
        for name, (good, count) in counts.items()
        if count < needed
    ]
    if few:
        unused = any(count < min(good, needed) for good, count in counts.values())
        log.warning(
            f"--false-alarm-rate {false_alarm_rate:g} needs {needed} good images to calibrate on: "
            f"{join_first(few)}. Their threshold is the largest score of a good image; give more good images, "
            f"{'fit with --calibration-folds 5, so that all of them calibrate, ' if unused else ''}"
            "or raise --false-alarm-rate"
        )
