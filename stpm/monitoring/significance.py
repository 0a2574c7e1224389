"""P-values of the differences between a night and good images, or earlier nights.

Each test compares two samples: a few calibration images do not give an exact distribution. The conformal p-values of a
night share one calibration, so 10,000 of them are not uniform; their images are exchangeable with the calibration's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special, stats

_MAX_EXACT = 10**7

FloatArray = npt.NDArray[np.floating[Any]]


class Difference(NamedTuple):
    """The largest vertical distance between two empirical distribution functions, 0 to 1, and its p-value."""

    distance: float
    p_value: float


class Rate(NamedTuple):
    """The number of alarms or errors among the images, of which there is at least one."""

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


def compare_samples(first: FloatArray, second: FloatArray) -> Difference:
    """Test whether two samples, of at least one value each, come from one distribution (Kolmogorov and Smirnov)."""
    # The exact p-value takes seconds for two large samples; for a small one, no other is right.
    method = "exact" if len(first) * len(second) <= _MAX_EXACT else "asymp"
    found = stats.ks_2samp(first, second, method=method)
    return Difference(float(found.statistic), min(float(found.pvalue), 1.0))


def compare_scores(p_values: FloatArray, calibration_count: int) -> Difference:
    """Test whether scores come from the distribution of the calibration's, given their conformal p-values.

    A p-value is (1 + number of calibration scores that are as high or higher) / (n + 1). It gives the rank of the score
    among the n calibration scores, and the test needs only ranks.
    """
    at_least = np.rint(np.asarray(p_values, np.float64) * (calibration_count + 1)) - 1
    # Calibration scores at 1 to n in descending order, and the night's between them.
    return compare_samples(at_least + 0.5, np.arange(1.0, calibration_count + 1))


def exceedances(count: int, total: int, reference: int, rank: int = 1) -> float:
    """Return the probability that at least `count` of `total` values exceed the `rank`-th largest of a reference.

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


def compare_rates(rate: Rate, usual: Sequence[Rate]) -> float:
    """Return the one-sided p-value that a rate is above those of earlier nights, one or more (Fisher's exact test).

    Nights differ more than random samples of images. Divide all counts by the dispersion of the earlier nights
    (Pearson's chi-squared per degree of freedom, at least 1), as in a quasi-binomial model.
    """
    dispersion = _dispersion(usual)
    pooled = pool(usual)
    events, total = math.floor(rate.events / dispersion), math.floor(rate.total / dispersion)
    usual_events, usual_total = math.floor(pooled.events / dispersion), math.floor(pooled.total / dispersion)
    return float(stats.hypergeom.sf(events - 1, total + usual_total, events + usual_events, total))


def _dispersion(rates: Sequence[Rate]) -> float:
    expected = pool(rates).value
    if len(rates) < 2 or expected in (0, 1):
        return 1.0
    events, totals = np.array(rates, np.float64).T
    chi_squared = ((events - totals * expected) ** 2 / (totals * expected * (1 - expected))).sum()
    return max(float(chi_squared) / (len(rates) - 1), 1.0)
