"""P-values of the differences between a night and good images, or earlier nights.

Each test compares two samples: a few calibration images do not give an exact distribution. The conformal p-values of a
night share one calibration, so 10,000 of them are not uniform; their images are exchangeable with the calibration's.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

_MAX_EXACT = 10**7

FloatArray = npt.NDArray[np.floating[Any]]


class Rate(NamedTuple):
    """A night's number of alarms or errors among its images, one or more; or its number of images, with a total of 1.

    It is compared with that of other nights of its group, such as a weekday.
    """

    events: int
    total: int
    group: int = 0

    @property
    def value(self) -> float:
        """Return the events of each of the total."""
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


def pool(rates: Iterable[Rate]) -> Rate:
    """Return the rate of several nights together."""
    events, totals, _ = zip(*rates, strict=True)
    return Rate(sum(events), sum(totals))


def pool_groups(rates: Sequence[Rate]) -> dict[int, Rate]:
    """Return the rate of the nights of each group together."""
    groups = {rate.group for rate in rates}
    return {group: pool(rate for rate in rates if rate.group == group) for group in groups}


def compare_nights(now: Sequence[Rate], usual: Sequence[Rate], *, fewer: bool = False) -> float:
    """Return the one-sided p-value that some nights have more events, or fewer, than earlier ones of their groups.

    Events are Poisson counts whose means vary from night to night, so that the variance of a count with mean m is
    m + cm². Estimate c ≥ 0 by making Pearson's chi-squared of the earlier nights equal to its degrees of freedom.
    Without differences between nights, it would be the exact conditional test of Poisson counts.
    """
    # That test of more events counts one more: no events so far do not make the next one impossible. In one of fewer, a
    # group without any says nothing about how much nights differ.
    pooled = pool_groups(usual)
    rates = {group: rate for group, each in pooled.items() if (rate := (each.events + (not fewer)) / each.total)}
    known = [night for night in usual if night.group in rates]
    expected = np.array([night.total * rates.get(night.group, 0.0) for night in now])
    degrees = len(known) - len(rates)
    if not degrees or not expected.any():
        return 1.0
    events, means = np.array([(night.events, night.total * rates[night.group]) for night in known], np.float64).T
    # Of each earlier night's events in the sum of `expected`.
    wanted = Counter({group: each.total for group, each in pool_groups(now).items()})
    weights = np.array([wanted[night.group] / pooled[night.group].total for night in known])
    squares = (events - means) ** 2 / means

    def surplus(variation: float) -> float:
        return float((squares / (1 + variation * means)).sum()) - degrees

    # Without the 1, the largest value would be the solution.
    variation = optimize.brentq(surplus, 0.0, float((squares / means).sum()) / degrees) if surplus(0.0) > 0 else 0.0
    mean = expected.sum()
    variance = variation * (expected**2).sum() + (weights**2 * (means + variation * means**2)).sum()
    # Of the gamma distribution of the mean that the nights have together.
    shape = mean**2 / variance
    found = pool(now).events
    if fewer:
        tail = special.betainc(shape, found + 1, shape / (shape + mean))
    else:
        tail = special.betainc(found, shape, mean / (mean + shape)) if found else 1.0
    # That variance is an estimate (Student's t).
    deviate = special.ndtri(np.clip(tail, sys.float_info.min, 1 - sys.float_info.epsilon))
    return float(special.stdtr(degrees, deviate))
