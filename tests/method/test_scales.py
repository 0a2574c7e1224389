from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stpm.method.scales import (
    DistanceScale,
    HeatmapScale,
    HeatmapScaleBuilder,
    fit_scales,
    leave_one_out_scales,
)


def build_scale(maps: Sequence[np.ndarray]) -> HeatmapScale:
    found = HeatmapScaleBuilder(sum(each.size for each in maps))
    for each in maps:
        found.add(each)
    return found.build()


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 60), st.sampled_from([0, 1, 3]))
def test_heatmap_scale_matches_quantile_and_maximum_of_all_pixels(
    seed: int, maps: int, side: int, decimals: int
) -> None:
    """Maps of different shapes, with and without ties, have the scale of all their pixels together."""
    rng = np.random.default_rng(seed)
    made = [
        rng.lognormal(size=(side, rng.integers(1, 60))).astype(np.float32).round(decimals or 9) for _ in range(maps)
    ]
    pixels, found = np.concatenate([each.ravel() for each in made]), build_scale(made)
    assert found.low == float(np.quantile(pixels, 0.99))
    assert found.good_max == max(float(pixels.max()), found.good_max if pixels.max() == found.low else 0.0)


def test_heatmap_scale_builder_keeps_few_pixels() -> None:
    rng = np.random.default_rng(0)
    tracemalloc.start()
    found = HeatmapScaleBuilder(2000 * 100 * 100)
    for _ in range(2000):
        found.add(rng.random((100, 100), np.float32))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.25 * 2000 * 100 * 100, "a quarter of a byte for each pixel"
    assert found.build().low == pytest.approx(0.99, abs=1e-4)


def test_heatmap_scale_exists_for_constant_maps() -> None:
    for value in (0.0, -3.0, 1e6):
        constant = np.full((3, 4, 4), value, np.float32)
        scale = build_scale(constant)
        assert scale.low < scale.good_max
        assert (scale.apply(constant) == 0).all()
        assert (scale.apply(constant + max(abs(value), 1.0)) == 255).all()


@pytest.mark.parametrize("scale", [HeatmapScale(1e-4, 0.1), HeatmapScale(0.0, 2.0), HeatmapScale(-3.0, -1.0)])
def test_heatmap_scale_puts_good_max_in_the_middle(scale: HeatmapScale) -> None:
    """The scale is linear from `low` (0) to `good_max` (1), then logarithmic up to 5."""
    relative = np.array([-1.0, 0.0, 0.25, 0.5, 1.0, np.sqrt(5.0), 5.0, 50.0])
    expected = [0.0, 0.0, 31.875, 63.75, 127.5, 191.25, 255.0, 255.0]
    levels = scale.apply((scale.low + relative * (scale.good_max - scale.low)).astype(np.float32))
    assert levels.dtype == np.uint8
    np.testing.assert_allclose(levels, expected, atol=0.51)


PARTS = st.lists(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=20), min_size=2, max_size=8)


def reference_quantile(values: list[float], fraction: float) -> float:
    """Return the smallest value that is at least as large as this fraction of all."""
    return next(v for v in sorted(values) if sum(other <= v for other in values) >= fraction * len(values))


ONE_VIEW = np.ones((1, 1), np.float32)


@given(PARTS)
def test_leave_one_out_scales_match_quantiles_of_the_others(part: list[list[float]]) -> None:
    arrays = [np.array([image], np.float32) for image in part]
    found = leave_one_out_scales(arrays, ONE_VIEW)
    assert len(found) == len(part)
    for i, (scale,) in enumerate(found):
        others = [v for j, image in enumerate(part) for v in image if j != i]
        assert scale.low == pytest.approx(reference_quantile(others, 0.9), rel=1e-5, abs=1e-5)
        assert scale.high == pytest.approx(reference_quantile(others, 0.995), rel=1e-5, abs=1e-5)
    every = [v for image in part for v in image]
    assert fit_scales(arrays, ONE_VIEW)[0].high == pytest.approx(reference_quantile(every, 0.995), rel=1e-5, abs=1e-5)


def test_views_have_scales_of_the_weighted_sum_of_their_scaled_maps() -> None:
    rng = np.random.default_rng(0)
    weights = np.array([[0, 0, 1], [0.25, 0.75, 0]], np.float32)
    images = [rng.gamma(2.0, size=(3, 40 + i)).astype(np.float32) for i in range(5)]
    one, two, three, fine, coarse = fit_scales(images, weights)
    pooled = np.concatenate(images, axis=1)
    scaled = [(row - s.low) / s.spread for row, s in zip(pooled, (one, two, three), strict=True)]
    for scale, view in ((fine, scaled[2]), (coarse, 0.25 * scaled[0] + 0.75 * scaled[1])):
        expected = np.quantile(view, (0.9, 0.995), method="inverted_cdf")
        assert [scale.low, scale.high] == pytest.approx(expected.tolist(), rel=1e-4)
    assert leave_one_out_scales(images, weights)[2] == fit_scales(images[:2] + images[3:], weights)


def test_a_view_that_hardly_varies_has_a_spread_in_its_own_units() -> None:
    images = [np.array([[1.0, 2.0]], np.float32)] * 3
    weights = np.array([[1.0], [1.0]], np.float32)
    for scale in fit_scales(images, weights)[1:]:
        assert scale.spread >= 0.05 - 1e-6


def test_part_scale_spread_is_positive() -> None:
    assert DistanceScale(0.0, 0.0).spread > 0
    assert DistanceScale(4.0, 4.0).spread == pytest.approx(0.2)
    assert DistanceScale(1.0, 4.0).spread == pytest.approx(3.0)
    assert DistanceScale(-4.0, -4.0).spread > 0
