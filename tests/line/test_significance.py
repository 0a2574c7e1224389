"""Each test rejects as often as its p-value says, though both sides are samples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stpm.line.significance import Rate, compare_nights, exceedances

NIGHTS = 1000


def most(rate: float) -> float:
    """Return the number of rejections among NIGHTS that a test at this rate exceeds once in a thousand times."""
    return float(stats.binom.ppf(0.999, NIGHTS, rate))


@given(st.integers(1, 40), st.integers(1, 300), st.data())
def test_exceedances_are_beta_binomial(reference: int, total: int, data: st.DataObject) -> None:
    rank, count = data.draw(st.integers(1, reference)), data.draw(st.integers(0, total))
    expected = stats.betabinom.sf(count - 1, total, rank, reference - rank + 1)
    assert exceedances(count, total, reference, rank) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_nights_that_do_not_differ_are_compared_by_the_exact_tests_of_counts() -> None:
    """Except that how much they differ is an estimate of four degrees of freedom."""

    def expected(events: int, usual: int, alternative: str) -> float:
        exact = stats.binomtest(events, events + usual, 1 / 6, alternative).pvalue
        return float(stats.t.cdf(stats.norm.ppf(exact), 4))

    assert compare_nights([Rate(24, 300)], [Rate(9, 300)] * 5) == pytest.approx(expected(24, 45, "greater"))
    assert compare_nights([Rate(9, 300)], [Rate(0, 300)] * 5) == pytest.approx(expected(9, 0, "greater"))
    assert compare_nights([Rate(60, 1)], [Rate(100, 1)] * 5, fewer=True) == pytest.approx(expected(60, 500, "less"))
    assert compare_nights([Rate(300, 300)], [Rate(0, 300)]) == 1


@pytest.mark.parametrize("nights", [2, 3, 6, 30])
def test_a_healthy_night_stands_out_of_few_or_many_as_often_as_stated(nights: int, rng: np.random.Generator) -> None:
    """Rates and numbers of images differ from night to night by a third, and numbers of images also by weekday."""
    rates, counts = [], []
    week = np.array([1, 1, 1.1, 1, 0.8, 0.2, 0])[np.arange(nights + 7) % 7]
    for _ in range(NIGHTS):
        mean = 30 * rng.gamma(9, 1 / 9, nights + 7)
        *usual, night = [Rate(int(alarms), 1000) for alarms in rng.poisson(mean[: nights + 1])]
        rates.append(compare_nights([night], usual))
        *usual, night = [Rate(images, 1, i % 7) for i, images in enumerate(rng.poisson(10 * mean * week).tolist())]
        counts.append(compare_nights([night], usual, fewer=True))
    for found in (rates, counts):
        for rate in (0.01, 0.001):
            assert (np.array(found) <= rate).sum() <= most(2 * rate)


@given(st.integers(1, 100_000), st.floats(0, 1), st.sampled_from([0.9, 0.95, 0.99]))
def test_the_interval_of_a_rate_is_that_of_clopper_and_pearson(total: int, share: float, confidence: float) -> None:
    events = round(share * total)
    expected = stats.binomtest(events, total).proportion_ci(confidence, method="exact")
    assert Rate(events, total).interval(confidence) == pytest.approx(tuple(expected), rel=1e-6)
