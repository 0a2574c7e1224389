"""Each test rejects as often as its p-value says, though both sides are samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stpm.method.calibration import Calibration, threshold_rank
from stpm.method.scales import HeatmapScale
from stpm.monitoring.significance import Rate, compare_rates, compare_samples, compare_scores, exceedances

NIGHTS = 1000


def most(rate: float) -> float:
    """Return the number of rejections among NIGHTS that a test at this rate exceeds once in a thousand times."""
    return float(stats.binom.ppf(0.999, NIGHTS, rate))


def conformal(rng: np.random.Generator, calibration: int, images: int) -> tuple[np.ndarray, np.ndarray, Calibration]:
    """Draw a calibration and a night of one distribution; return scores and p-values of the night."""
    scores = rng.gamma(2.0, size=images).astype(np.float32)
    fitted = Calibration(np.sort(rng.gamma(2.0, size=calibration)).astype(np.float32), HeatmapScale(0.0, 1.0))
    return scores, fitted.p_values(scores), fitted


@pytest.mark.parametrize(("calibration", "images"), [(10, 12), (10, 1000), (50, 60), (50, 2000), (100, 400)])
def test_p_values_of_good_nights_are_uniform_given_that_their_calibration_is_a_sample(
    calibration: int, images: int, rng: np.random.Generator
) -> None:
    nights = [conformal(rng, calibration, images)[1] for _ in range(NIGHTS)]
    found = np.array([compare_scores(p_values, calibration).p_value for p_values in nights])
    for rate in (0.05, 0.01, 0.001):
        assert (found <= rate).sum() <= most(rate)
    if images >= 400:
        # A test that takes the calibration for exact calls most good nights bad.
        naive = np.array([stats.kstest(p_values, "uniform").pvalue for p_values in nights[:100]])
        assert (naive <= 0.01).mean() > 0.5


def test_scores_are_compared_as_the_scores_themselves_would_be(rng: np.random.Generator) -> None:
    scores, p_values, calibration = conformal(rng, 40, 300)
    expected = stats.ks_2samp(scores, calibration.scores, method="exact")
    assert compare_scores(p_values, 40) == pytest.approx((expected.statistic, expected.pvalue))


@given(st.integers(1, 40), st.integers(1, 300), st.data())
def test_exceedances_are_beta_binomial(reference: int, total: int, data: st.DataObject) -> None:
    rank, count = data.draw(st.integers(1, reference)), data.draw(st.integers(0, total))
    expected = stats.betabinom.sf(count - 1, total, rank, reference - rank + 1)
    assert exceedances(count, total, reference, rank) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("false_alarm_rate", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("calibration", [10, 60])
def test_alarms_of_good_nights_exceed_their_calibration_as_often_as_stated(
    calibration: int, false_alarm_rate: float, rng: np.random.Generator
) -> None:
    found = []
    for _ in range(NIGHTS):
        scores, _, fitted = conformal(rng, calibration, 200)
        alarms = int((scores > fitted.threshold(false_alarm_rate)).sum())
        found.append(exceedances(alarms, 200, calibration, threshold_rank(calibration, false_alarm_rate)))
    for rate in (0.05, 0.01):
        assert (np.array(found) <= rate).sum() <= most(rate)


def test_rates_are_compared_by_fishers_exact_test() -> None:
    expected = stats.fisher_exact([[24, 276], [45, 1455]], alternative="greater").pvalue
    assert compare_rates(Rate(24, 300), [Rate(9, 300)] * 5) == pytest.approx(expected)


def test_nights_that_differ_among_themselves_do_not_make_the_next_one_stand_out(rng: np.random.Generator) -> None:
    """Defects come in lots: the rates of nights vary by more than those of random images."""
    found = []
    for _ in range(NIGHTS):
        rates = [Rate(int(rng.binomial(2000, rng.beta(6, 144))), 2000) for _ in range(21)]
        found.append(compare_rates(rates[-1], rates[:-1]))
    assert (np.array(found) <= 0.01).mean() <= 0.04
    pooled = [stats.binomtest(r.events, r.total, 0.04, "greater").pvalue for r in rates]
    assert min(pooled) < 0.001


@given(st.integers(1, 100_000), st.floats(0, 1), st.sampled_from([0.9, 0.95, 0.99]))
def test_the_interval_of_a_rate_is_that_of_clopper_and_pearson(total: int, share: float, confidence: float) -> None:
    events = round(share * total)
    expected = stats.binomtest(events, total).proportion_ci(confidence, method="exact")
    assert Rate(events, total).interval(confidence) == pytest.approx(tuple(expected), rel=1e-6)


def test_samples_without_any_spread_can_be_compared() -> None:
    assert compare_samples(np.ones(9), np.ones(30)) == (0.0, 1.0)
    assert compare_samples(np.ones(9), np.zeros(30)).distance == 1.0
