from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import lognorm

from stpm.method.calibration import (
    Calibration,
    log_normal_limit,
    min_calibration_images,
    promised_rates,
    threshold,
    warn_about_few_good_images,
)
from stpm.method.scales import HeatmapScale

SCORES = st.lists(st.floats(0, 8, width=32), min_size=1, max_size=60)


def calibrate(scores: Sequence[float] | np.ndarray) -> Calibration:
    return Calibration(np.sort(np.array(scores, np.float32)), HeatmapScale(0.0, 1.0))


@given(SCORES, SCORES)
def test_p_values_match_definition(calibration: list[float], scores: list[float]) -> None:
    found = calibrate(calibration)
    expected = [(1 + sum(c >= s for c in found.scores)) / (len(calibration) + 1) for s in np.array(scores, np.float32)]
    np.testing.assert_allclose(found.p_values(np.array(scores, np.float32)), expected, rtol=1e-6)


@given(SCORES, st.floats(0, 8, width=32), st.floats(0.001, 0.999))
def test_score_exceeds_threshold_iff_p_value_within_rate(calibration: list[float], score: float, rate: float) -> None:
    found = calibrate(calibration)
    supported = max(rate, 1 / (len(calibration) + 1))
    above = score > threshold(found.scores, rate)
    p = found.p_values(np.array([score], np.float32)).astype(np.float64)[0]
    assert above == (p <= supported + 1e-6)


@given(SCORES, st.floats(-1, 9))
def test_any_threshold_promises_what_the_rate_with_the_same_alarms_does(values: list[float], threshold: float) -> None:
    scores = calibrate(values).scores
    above, n = sum(score > np.float32(threshold) for score in scores), len(scores)
    expected, bound = promised_rates(scores, threshold)
    assert expected == pytest.approx((1 + above) / (n + 1))
    # Of n good images at most `above` exceed a threshold that this fraction exceeds: in one of ten cases.
    assert bound == 1.0 if above == n else stats.binom.cdf(above, n, bound) == pytest.approx(0.1)


def test_a_log_normal_limit_is_exceeded_at_its_rate_and_moves_with_the_scores() -> None:
    rng = np.random.default_rng(0)
    drawn = np.sort(rng.lognormal(0, 0.4, (2000, 30)), axis=1).astype(np.float32)
    limits = np.array([log_normal_limit(scores, 0.01) for scores in drawn])
    # The point that distances are from is not the true one, 0.
    assert 0.005 < lognorm.sf(limits, 0.4).mean() < 0.02
    assert log_normal_limit(3 * drawn[0] - 7, 0.01) == pytest.approx(3 * limits[0] - 7, rel=1e-3)
    assert log_normal_limit(np.full(5, 2, np.float32), 0.001) == pytest.approx(2, abs=1e-3)


@given(st.floats(0.0005, 0.999))
def test_min_calibration_images_is_smallest_sufficient_number(rate: float) -> None:
    n = min_calibration_images(rate)
    assert 1 / (n + 1) <= rate * (1 + 1e-6)
    assert n == 0 or 1 / n > rate * (1 - 1e-6)


def test_warning_about_few_good_images_names_categories_and_remedies(caplog: pytest.LogCaptureFixture) -> None:
    screw = (500, 400)
    warn_about_few_good_images({"nut": (120, 99), "screw": screw}, 0.01)
    assert not caplog.messages
    warn_about_few_good_images({"nut": (122, 98), "screw": screw}, 0.01)
    warn_about_few_good_images({f"part-{i}": (209, 42) for i in range(1000)}, 0.01)
    warn_about_few_good_images({"nut": (40, 40)}, 0.01)
    warning, many, all_calibrate = caplog.messages
    assert all_calibrate.endswith("give more good images, or raise --false-alarm-rate")
    assert warning.startswith(
        "--false-alarm-rate 0.01 needs 99 good images to calibrate on: nut calibrates on 98 of its 122 good "
        "images, which supports a rate of 0.010 or more."
    )
    assert "screw" not in warning
    assert "part-4 calibrates on 42 of its 209 good images, which supports a rate of 0.023 or more; and 995" in many
    assert "give more good images, fit with --calibration-folds 5, so that all of them calibrate, or raise" in many
    assert len(many) < 750
