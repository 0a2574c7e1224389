from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stpm.errors import ConfigError
from stpm.method.calibration import (
    HeatmapScaleBuilder,
    HeatmapScale,
    NormalCounts,
    PartScale,
    check_false_alarm_rate,
    normals_for,
    p_values,
    part_scale,
    leave_one_out_scales,
    few_normals_warning,
    threshold,
)

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
    screw = NormalCounts(500, 400)
    assert few_normals_warning({"nut": NormalCounts(120, 99), "screw": screw}, 0.01) == ""
    warning = few_normals_warning({"nut": NormalCounts(122, 98), "screw": screw}, 0.01)
    assert warning.startswith(
        "warning: false-alarm-rate 0.01 takes 99 good images to calibrate on; nut has 98 of its 122 good images and "
        "supports 0.010."
    )
    assert "screw" not in warning
    many = few_normals_warning({f"part-{i}": NormalCounts(209, 42) for i in range(1000)}, 0.01)
    assert "part-4 has 42 of its 209 good images and supports 0.023, and 995 more." in many
    assert len(many) < 700


@pytest.mark.parametrize(
    ("normals", "folds_where_there_are", "more_images"),
    [(NormalCounts(122, 24), True, False), (NormalCounts(14, 3), False, True), (NormalCounts(14, 14), False, True)],
)
def test_folds_are_advised_where_they_would_do(
    normals: NormalCounts, folds_where_there_are: bool, more_images: bool
) -> None:
    warning = few_normals_warning({"nut": normals}, 0.01)
    assert ("where there are 99 good images, fit with --calibration-folds 5" in warning) == folds_where_there_are
    assert ("give at least 99 good images and fit with --calibration-folds 5" in warning) == more_images
    assert "raise --false-alarm-rate" in warning


@pytest.mark.parametrize("rate", [0.0, 1.0, -1.0, float("nan")])
def test_a_rate_is_a_share(rate: float) -> None:
    with pytest.raises(ConfigError, match="false-alarm-rate"):
        check_false_alarm_rate(rate)


def scale_of(maps: Sequence[np.ndarray]) -> HeatmapScale:
    found = HeatmapScaleBuilder(sum(each.size for each in maps))
    for each in maps:
        found.add(each)
    return found.scale()


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 60), st.sampled_from([0, 1, 3]))
@settings(deadline=None)
def test_the_heatmap_scale_is_the_quantile_and_the_maximum_of_all_pixels(
    seed: int, maps: int, side: int, decimals: int
) -> None:
    """Maps of different shapes, with and without ties, as if all of them were in memory."""
    rng = np.random.default_rng(seed)
    made = [
        rng.lognormal(size=(side, rng.integers(1, 60))).astype(np.float32).round(decimals or 9) for _ in range(maps)
    ]
    pixels, found = np.concatenate([each.ravel() for each in made]), scale_of(made)
    assert found.low == float(np.quantile(pixels, 0.99))
    assert found.edge == max(float(pixels.max()), found.edge if pixels.max() == found.low else 0.0)


def test_of_many_maps_few_pixels_are_held() -> None:
    rng = np.random.default_rng(0)
    tracemalloc.start()
    found = HeatmapScaleBuilder(2000 * 100 * 100)
    for _ in range(2000):
        found.add(rng.random((100, 100), np.float32))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.25 * 2000 * 100 * 100, "bytes: a quarter of one for each pixel"
    assert found.scale().low == pytest.approx(0.99, abs=1e-4)


def test_constant_maps_have_a_scale_too() -> None:
    for value in (0.0, -3.0, 1e6):
        constant = np.full((3, 4, 4), value, np.float32)
        scale = scale_of(constant)
        assert scale.low < scale.edge
        assert (scale.apply(constant) == 0).all()
        assert (scale.apply(constant + max(abs(value), 1.0)) == 255).all()


@pytest.mark.parametrize("scale", [HeatmapScale(1e-4, 0.1), HeatmapScale(0.0, 2.0), HeatmapScale(-3.0, -1.0)])
def test_the_edge_of_normal_is_the_middle_of_every_scale(scale: HeatmapScale) -> None:
    """As a share of the way from `low` to `edge`: linear up to 1, logarithmic from there to 5."""
    share = np.array([-1.0, 0.0, 0.25, 0.5, 1.0, np.sqrt(5.0), 5.0, 50.0])
    expected = [0.0, 0.0, 31.875, 63.75, 127.5, 191.25, 255.0, 255.0]
    levels = scale.apply((scale.low + share * (scale.edge - scale.low)).astype(np.float32))
    assert levels.dtype == np.uint8
    np.testing.assert_allclose(levels, expected, atol=0.51)


@given(
    st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=50),
    st.floats(-5, 5),
    st.floats(1e-3, 5),
)
def test_a_larger_anomaly_is_never_drawn_lower(values: list[float], low: float, width: float) -> None:
    ordered = np.sort(np.array(values, np.float32))
    levels = HeatmapScale(low, low + width).apply(ordered).astype(int)
    assert (np.diff(levels) >= 0).all()
    assert (levels[ordered < low] == 0).all()
    assert (levels[ordered > low + 5.01 * width] == 255).all()


PARTS = st.lists(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=20), min_size=2, max_size=8)


def reference_quantile(values: list[float], share: float) -> float:
    """The smallest value that is at least as large as this share of all."""
    return next(v for v in sorted(values) if sum(other <= v for other in values) >= share * len(values))


@given(PARTS)
def test_the_scale_of_each_normal_is_that_of_all_others(part: list[list[float]]) -> None:
    arrays = [np.array(image, np.float32) for image in part]
    found = leave_one_out_scales(arrays)
    assert len(found) == len(part)
    for i, scale in enumerate(found):
        others = [v for j, image in enumerate(part) for v in image if j != i]
        assert scale.low == pytest.approx(reference_quantile(others, 0.9), rel=1e-5, abs=1e-5)
        assert scale.high == pytest.approx(reference_quantile(others, 0.995), rel=1e-5, abs=1e-5)
    every = [v for image in part for v in image]
    assert fit_part_scale(arrays).high == pytest.approx(reference_quantile(every, 0.995), rel=1e-5, abs=1e-5)


def test_a_part_that_does_not_vary_has_a_spread_too() -> None:
    assert PartScale(0.0, 0.0).spread > 0
    assert PartScale(4.0, 4.0).spread == pytest.approx(0.2)
    assert PartScale(1.0, 4.0).spread == pytest.approx(3.0)
    assert PartScale(-4.0, -4.0).spread > 0


def test_an_image_equal_to_all_held_out_normals_scores_as_they_do() -> None:
    image = np.linspace(1.0, 3.0, 64, dtype=np.float32)
    held_out = [image] * 8
    assert fit_part_scale(held_out) == leave_one_out_scales(held_out)[0]
