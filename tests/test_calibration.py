from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stpm.calibration import HeatmapScale, calibrate, check_rate, normals_for, p_values, shortfall, threshold
from stpm.errors import ConfigError

SCORES = st.lists(st.floats(0, 8, width=32), min_size=1, max_size=60)


@given(SCORES, SCORES)
def test_p_values_are_the_definition(calibration: list[float], scores: list[float]) -> None:
    ordered = np.sort(np.array(calibration, np.float32))
    expected = [(1 + sum(c >= s for c in ordered)) / (len(ordered) + 1) for s in np.array(scores, np.float32)]
    np.testing.assert_allclose(p_values(ordered, np.array(scores, np.float32)), expected, rtol=1e-6)


@given(SCORES, st.floats(0, 8, width=32), st.floats(0.001, 0.999))
def test_above_the_threshold_is_a_p_value_up_to_the_rate(calibration: list[float], score: float, rate: float) -> None:
    ordered = np.sort(np.array(calibration, np.float32))
    supported = max(rate, 1 / (len(ordered) + 1))
    above = score > threshold(ordered, rate)
    p = p_values(ordered, np.array([score], np.float32)).astype(np.float64)[0]
    assert above == (p <= supported + 1e-6)


def test_on_exchangeable_scores_the_false_alarm_rate_holds() -> None:
    rng = np.random.default_rng(0)
    for rate in (0.02, 0.05, 0.2):
        alarms = []
        for _ in range(2000):
            scores = rng.gamma(2.0, size=120).astype(np.float32)
            alarms.append((scores[100:] > threshold(np.sort(scores[:100]), rate)).mean())
        assert np.mean(alarms) <= rate + 3 * np.std(alarms) / np.sqrt(len(alarms))


@given(st.lists(st.floats(0, 8, width=32), min_size=2, max_size=60), st.floats(0.001, 0.999))
def test_whichever_of_exchangeable_scores_came_last_the_rate_holds(values: list[float], rate: float) -> None:
    """Exchangeable: each of n + 1 scores is as likely to be the new one. So at most the rate's share may alarm."""
    scores = np.array(values, np.float32)
    alarms = sum(scores[i] > threshold(np.sort(np.delete(scores, i)), rate) for i in range(len(scores)))
    assert alarms <= max(rate * len(scores) + 1e-6, 1)


@given(st.floats(0.0005, 0.999))
def test_a_rate_takes_as_many_normals_as_support_it(rate: float) -> None:
    n = normals_for(rate)
    assert 1 / (n + 1) <= rate * (1 + 1e-6)
    assert n == 0 or 1 / n > rate * (1 - 1e-6)


def test_too_few_normals_are_said_with_what_it_takes() -> None:
    assert shortfall({"nut": 99, "screw": 400}, 0.01) == ""
    warning = shortfall({"nut": 98, "screw": 400}, 0.01)
    assert warning.startswith(
        "warning: false-alarm-rate 0.01 takes 99 held-out normals; nut has 98 and supports 0.010."
    )
    assert "--calibration-folds" in warning
    assert "screw" not in warning
    many = shortfall({f"part-{i}": 42 for i in range(1000)}, 0.01)
    assert "part-4 has 42 and supports 0.023, and 995 more." in many
    assert len(many) < 500


@pytest.mark.parametrize("rate", [0.0, 1.0, -1.0, float("nan")])
def test_a_rate_is_a_share(rate: float) -> None:
    with pytest.raises(ConfigError, match="false-alarm-rate"):
        check_rate(rate)


def test_calibration_of_maps() -> None:
    maps = np.arange(1.0, 1001.0, dtype=np.float32).reshape(2, 20, 25)
    found = calibrate(maps)
    np.testing.assert_array_equal(found.scores, [500.0, 1000.0])
    assert (sum(maps.ravel() > found.scale.low), found.scale.edge) == (10, 1000.0)


def test_maps_of_different_shapes_are_calibrated_by_their_pixels() -> None:
    values = np.arange(1.0, 1001.0, dtype=np.float32)
    found = calibrate([values[:200].reshape(10, 20), values[200:].reshape(40, 20)])
    np.testing.assert_array_equal(found.scores, [200.0, 1000.0])
    assert (sum(values > found.scale.low), found.scale.edge) == (10, 1000.0)


def test_constant_maps_have_a_scale_too() -> None:
    scale = calibrate(np.zeros((3, 4, 4), np.float32)).scale
    assert 0 < scale.low < scale.edge
    assert (scale.apply(np.zeros((4, 4), np.float32)) == 0).all()


def test_the_edge_of_normal_is_the_middle_of_every_scale() -> None:
    for scale in (HeatmapScale(1e-4, 0.1), HeatmapScale(0.01, 0.02)):
        levels = scale.apply(np.array([0.0, scale.low, scale.edge, 5 * scale.edge, 8.0], np.float32))
        assert levels.tolist()[:2] == [0, 0]
        assert levels[2] == pytest.approx(127.5, abs=1)
        assert levels.tolist()[3:] == [255, 255]


@given(st.lists(st.floats(0, 8, width=32), min_size=2, max_size=50))
def test_a_larger_anomaly_is_never_drawn_lower(values: list[float]) -> None:
    ordered = np.sort(np.array(values, np.float32))
    levels = HeatmapScale(1e-3, 0.2).apply(ordered).astype(int)
    assert (np.diff(levels) >= 0).all()
