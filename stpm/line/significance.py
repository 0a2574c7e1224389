"""P-values of the differences between a night and good images, or earlier nights.

Each test compares two samples: a few calibration images do not give an exact distribution. The conformal p-values of a
night share one calibration, so 10,000 of them are not uniform; their images are exchangeable with the calibration's.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

_MAX_EXACT = 10**7

FloatArray = npt.NDArray[np.floating[Any]]


class Rate(NamedTuple):
    """The number of alarms or errors among the images, of which there is one or more."""

    events: int
    total: int

    @property
    def value(self) -> float:
        """Return the rate, 0 to 1."""
        return self.events / self.total

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the exact interval of Clopper and Pearson (Biometrika 26, 1934)."""
        tail, others = (1 - confidence) / 2, self.total - self.events
        # Quantiles of beta distributions, without the overhead of `scipy.stats`: a page has thousands.
        low = special.betaincinv(self.events, others + 1, tail) if self.events else 0.0
        high = special.betaincinv(self.events + 1, others, 1 - tail) if others else 1.0
        return float(low), float(high)


def compare_samples(first: FloatArray, second: FloatArray) -> tuple[float, float]:
    """Test whether two samples, of one value or more each, come from one distribution (Kolmogorov and Smirnov).

    Returns:
        The largest vertical distance between their empirical distribution functions, 0 to 1, and its p-value.
    """
    # The exact p-value takes seconds for two large samples; for a small one, no other is right.
    found = stats.ks_2samp(first, second, method="exact" if len(first) * len(second) <= _MAX_EXACT else "asymp")
    return float(found.statistic), min(float(found.pvalue), 1.0)


def compare_scores(p_values: FloatArray, calibration_count: int) -> tuple[float, float]:
    """Compare scores with those of the calibration, as `compare_samples` does, given their conformal p-values.

    A p-value is (1 + number of calibration scores that are as high or higher) / (n + 1). It gives the rank of the score
    among the n calibration scores, and the test needs only ranks.
    """
    as_high = np.rint(np.asarray(p_values, np.float64) * (calibration_count + 1)) - 1
    # Calibration scores at 1 to n in descending order, and the night's between them.
    return compare_samples(as_high + 0.5, np.arange(1.0, calibration_count + 1))


def exceedances(count: int, total: int, reference: int, rank: int = 1) -> float:
    """Return the probability that `count` or more of `total` values exceed the `rank`-th largest of a reference.

    Both are samples of one continuous distribution: the count is beta-binomial, here written as hypergeometric
    (Wilks, Annals of Mathematical Statistics 13, 1942).

    >>> round(exceedances(count=1, total=1, reference=9), 6)
    0.1
    """
    if not count:
        return 1.0
    # `count` values exceed it if fewer than `rank` of the highest count + rank − 1 values are of the reference.
    return float(stats.hypergeom.cdf(rank - 1, reference + total, reference, count + rank - 1))


def pool(rates: Sequence[Rate]) -> Rate:
    """Return the rate of several nights together."""
    return Rate(sum(rate.events for rate in rates), sum(rate.total for rate in rates))


def compare_rates(now: Sequence[Rate], usual: Sequence[Rate]) -> float:
    """Return the one-sided p-value that the rate of some nights is above that of earlier ones, one or more.

    Without differences between nights, it would be the exact conditional test of two Poisson rates.
    """
    degrees = len(usual) - 1
    if not degrees:
        return 1.0
    recent, earlier = pool(now), pool(usual)
    # That test counts one event more: no events so far do not make the next one impossible.
    rate = (earlier.events + 1) / earlier.total
    events, totals = np.array(usual, np.float64).T
    expected = np.array([night.total * rate for night in now])
    weights = np.full(len(usual), recent.total / earlier.total)
    shape = _shape(expected, events, totals * rate, weights, degrees)
    mean = recent.total * rate
    tail = special.betainc(recent.events, shape, mean / (mean + shape)) if recent.events else 1.0
    return _allow_for_estimate(tail, degrees)


def compare_counts(now: Sequence[tuple[int, int]], usual: Mapping[int, Sequence[int]]) -> float:
    """Return the one-sided p-value that some nights have fewer images than earlier ones of the same groups.

    Args:
        now: group, such as a weekday, and number of images of each night.
        usual: the numbers of earlier nights by group: of every group of `now`, and perhaps of others.
    """
    # A group without images says nothing about how much nights differ.
    means = {group: sum(counts) / len(counts) for group, counts in usual.items() if any(counts)}
    expected = np.array([means.get(group, 0.0) for group, _ in now])
    wanted = Counter(group for group, _ in now)
    nights = [(count, means[name], wanted[name] / len(usual[name])) for name in means for count in usual[name]]
    degrees = len(nights) - len(means)
    if not expected.any() or not degrees:
        return 1.0
    counts, usual_means, weights = np.array(nights, np.float64).T
    shape = _shape(expected, counts, usual_means, weights, degrees)
    found = sum(count for _, count in now)
    return _allow_for_estimate(special.betainc(shape, found + 1, shape / (shape + expected.sum())), degrees)


def _shape(expected: FloatArray, events: FloatArray, means: FloatArray, weights: FloatArray, degrees: int) -> float:
    """Return the shape of the gamma distribution of the mean that some nights have together.

    Events are Poisson counts whose means vary from night to night, so that the variance of a count with mean m is
    m + cm². Estimate c ≥ 0 by making Pearson's chi-squared of the earlier nights equal to its degrees of freedom.

    Args:
        expected: events of each of the nights.
        events, means: of each earlier night, and their expectation.
        weights: of each earlier night's events in the sum of `expected`.
        degrees: number of earlier nights, less that of the means that they estimate; 1 or more.
    """
    squares = (events - means) ** 2 / means

    def surplus(variation: float) -> float:
        return float((squares / (1 + variation * means)).sum()) - degrees

    # Without the 1, the largest value would be the solution.
    largest = float((squares / means).sum()) / degrees
    variation = optimize.brentq(surplus, 0.0, largest) if surplus(0.0) > 0 else 0.0
    variance = variation * (expected**2).sum() + (weights**2 * (means + variation * means**2)).sum()
    return float(expected.sum() ** 2 / variance)


def _allow_for_estimate(tail: float, degrees: int) -> float:
    """Return the p-value for a tail of a distribution whose variance is an estimate (Student's t)."""
    deviate = special.ndtri(np.clip(tail, sys.float_info.min, 1 - sys.float_info.epsilon))
    return float(special.stdtr(degrees, deviate))
