"""Anomaly maps and scores against plain numpy, written from the papers' text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stpm.method.anomaly_maps import AnomalyMaps, nearest_positions
from stpm.method.calibration import Calibration
from stpm.method.fusion import (
    fuse_levels,
    fuse_views,
    map_weights,
    on_one_grid,
    sample_distances,
    soft_maximum,
    upsample,
)
from stpm.method.loss import distance_map
from stpm.method.preprocessing import Content
from stpm.method.recipe import FusionMethod
from stpm.method.scales import DistanceScale, HeatmapScale, fit_scales, leave_one_out_scales
from stpm.method.teacher import content_mask
from tests.method.test_loss import boxes, features, reference_distance


def reference_upsample(distances: np.ndarray, input_shape: tuple[int, int]) -> np.ndarray:
    """Interpolate (H, W) bilinearly between pixel centres, clamped at the borders."""
    for axis, length in enumerate(input_shape):
        n = distances.shape[axis]
        position = np.clip((np.arange(length) + 0.5) * n / length - 0.5, 0, n - 1)
        low = np.floor(position).astype(int)
        high = np.minimum(low + 1, n - 1)
        weight = np.expand_dims(position - low, 1 - axis)
        distances = distances.take(low, axis) * (1 - weight) + distances.take(high, axis) * weight
    return distances


def random_maps(*shapes: tuple[int, int], images: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(images, *shape, generator=generator) for shape in shapes]


def whole_maps(total: Tensor, views: Tensor | None = None, sigma: float = 0.0) -> AnomalyMaps:
    """Make the maps of images that fill the input."""
    boxes = np.array([(0, 0, total.shape[2], total.shape[1])] * len(total), np.int32)
    return AnomalyMaps.smooth(
        total, total.new_zeros(0, len(total), 1, 1) if views is None else views, Content(boxes), sigma
    )


def quantile_fuse(
    student: Sequence[Tensor],
    memory: Sequence[Tensor],
    scales: Sequence[DistanceScale],
    student_weight: float = 0.25,
    shape: tuple[int, int] = (32, 24),
    valid: Sequence[Tensor | None] = (),
) -> Tensor:
    maps = [*student, *memory]
    weights = map_weights([0] * len(student), [0] * len(memory), student_weight)
    (fused,) = fuse_views(on_one_grid(maps, valid or [None] * len(maps)), weights, scales)
    return upsample(fused, shape, max(valid, key=lambda mask: 0 if mask is None else mask.numel(), default=None))


def test_fuse_product_matches_paper_and_fuse_sum_adds_upsampled_maps() -> None:
    teacher, student = features(0), features(1)
    expected = np.ones((2, 64, 48))
    for t, s in zip(teacher, student, strict=True):
        expected *= np.stack([reference_upsample(image, (64, 48)) for image in reference_distance(t, s)])
    maps = [distance_map(torch.from_numpy(t), torch.from_numpy(s)) for t, s in zip(teacher, student, strict=True)]
    total = fuse_levels(maps, [None] * 3, "product", (64, 48))
    np.testing.assert_allclose(total.numpy(), expected, atol=1e-5)
    found = whole_maps(total).scalars(0.0).numpy()
    assert found.shape == (2, 3)
    np.testing.assert_allclose(found[:, 2], expected.max(axis=(1, 2)), atol=1e-5)
    assert found[:, 1].tolist() == [each.argmax() for each in total]
    distances = random_maps((4, 12), (8, 6), (2, 3))
    total = fuse_levels(distances, [None] * 3, "sum", (16, 24))
    np.testing.assert_allclose(
        total[0].numpy(), sum(reference_upsample(d[0].numpy(), (16, 24)) for d in distances), atol=1e-6
    )
    # Maps are brought to the grid of the finest.
    for found, given_map in zip(on_one_grid(distances, [None] * 3), distances, strict=True):
        np.testing.assert_allclose(found[0].numpy(), reference_upsample(given_map[0].numpy(), (8, 12)), atol=1e-6)


@pytest.mark.parametrize(("levels", "banks"), [(2, 3), (0, 3), (2, 0), (1, 1)])
@pytest.mark.parametrize("student_weight", [0.25, 0.6])
def test_a_view_averages_student_and_memory_by_their_weights(levels: int, banks: int, student_weight: float) -> None:
    maps = random_maps(*[(32, 20)] * (levels + banks))
    # A spread of 0 is replaced by a twentieth of the high quantile.
    scales = [DistanceScale(0.1 * i, 0.1 * i + 0.5) if i else DistanceScale(2.0, 2.0) for i in range(levels + banks)]
    scaled = [(d[0].numpy() - s.low) / (s.high - s.low or 0.1) for d, s in zip(maps, scales, strict=True)]
    total = quantile_fuse(maps[:levels], maps[levels:], scales, student_weight, (32, 20))
    weights = (student_weight, 1 - student_weight) if levels and banks else (1.0, 1.0)
    expected = sum(
        weight * np.mean(own, axis=0)
        for weight, own in zip(weights, (scaled[:levels], scaled[levels:]), strict=True)
        if own
    )
    np.testing.assert_allclose(total[0].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_each_view_is_scaled_before_they_are_combined() -> None:
    maps = torch.stack(random_maps((5, 4), (5, 4), (5, 4)))
    scales = [DistanceScale(0.1, 0.6), DistanceScale(0.2, 0.4), DistanceScale(0.0, 1.0)]
    units = [DistanceScale(1.0, 3.0), DistanceScale(-1.0, 1.0)]
    fine, coarse = fuse_views(maps, map_weights([1], [0, 1], 0.25), scales + units)
    torch.testing.assert_close(fine, ((maps[1] - 0.2) / 0.2 - 1) / 2)
    torch.testing.assert_close(coarse, (0.25 * (maps[0] - 0.1) / 0.5 + 0.75 * maps[2] + 1) / 2)


@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(0.01, 0.99))
def test_soft_maximum_is_between_the_weighted_mean_and_the_maximum(fine: float, coarse: float, weight: float) -> None:
    found = float(soft_maximum(torch.tensor([fine, coarse]), weight))
    coarse = coarse if coarse <= 2 else 2 + np.log(coarse - 1)
    expected = 0.5 * np.logaddexp(np.log(1 - weight) + 2 * fine, np.log(weight) + 2 * coarse)
    assert found == pytest.approx(expected, abs=1e-4)
    assert (1 - weight) * fine + weight * coarse - 1e-4 <= found <= max(fine, coarse) + 1e-4


# A side of more than 64 pixels is smoothed in tiles.
@given(st.floats(0.3, 4.0), st.integers(1, 140), st.integers(1, 40))
@settings(max_examples=30)
def test_smoothed_matches_gaussian_with_repeated_borders(sigma: float, height: int, width: int) -> None:
    (maps,) = random_maps((height, width))
    radius = int(3 * sigma + 0.5)
    kernel = np.exp(-np.square(np.arange(-radius, radius + 1)) / (2 * sigma**2))
    padded = np.pad(maps.double().numpy(), ((0, 0), (radius, radius), (radius, radius)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * radius + 1, 2 * radius + 1), (1, 2))
    expected = np.einsum("bhwyx,y,x->bhw", windows, kernel / kernel.sum(), kernel / kernel.sum())
    assert whole_maps(maps).total is maps
    np.testing.assert_allclose(whole_maps(maps, sigma=sigma).total, expected, atol=1e-5)


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0, 0.99), st.integers(0, 1000))
def test_score_is_mean_of_highest_pixels_and_views_are_read_there(
    height: int, width: int, fraction: float, seed: int
) -> None:
    view = np.random.default_rng(seed).permutation(height * width).reshape(height, width).astype(np.float32)
    # Each position of the view is a square of pixels.
    total = view.repeat(2, axis=0).repeat(2, axis=1)
    views = torch.from_numpy(np.stack([view, -view]))[:, None]
    maps = whole_maps(torch.from_numpy(total)[None], views)
    count = max(round(fraction * total.size), 1)
    highest = np.sort(total.ravel())[::-1][:count].mean()
    expected = [total.max(), total.argmax(), highest, highest, -highest]
    assert maps.scalars(fraction)[0].tolist() == pytest.approx(expected, abs=1e-5)
    assert maps.scalars(fraction)[:, 2].tolist() == [pytest.approx(highest, abs=1e-5)]


def test_sample_distances_are_evenly_spaced_over_valid_positions() -> None:
    distances = torch.arange(2 * 50 * 40.0).reshape(2, 50, 40)
    maps = torch.stack([distances, -distances])
    for image, values in zip(distances, sample_distances(maps), strict=True):
        assert values.shape == (2, 1024)
        assert (values[0, 0], values[0, -1]) == (image.min(), image.max())
        assert set(np.diff(values[0])) == {1.0, 2.0}
        # All maps are read at the same positions.
        np.testing.assert_array_equal(values[0], -values[1])
    valid = torch.zeros(2, 50, 40, dtype=torch.bool)
    valid[0, :30] = valid[1, 7, 3] = True
    first, second = sample_distances(maps, valid)
    assert (first.shape, first[0, 0], first[0, -1]) == ((2, 1024), 0.0, 1199.0)
    assert second[0].tolist() == [distances[1, 7, 3].item()]
    for image, values in zip(distances[:, :5], sample_distances(maps[:, :, :5]), strict=True):
        np.testing.assert_array_equal(values[0], image.numpy().ravel())


def fuse_any(method: FusionMethod, maps: Sequence[Tensor], valid: Sequence[Tensor | None], *shape: int) -> Tensor:
    if method != "quantile":
        return fuse_levels(maps, valid, method, (shape[0], shape[1]))
    scales = [DistanceScale(0.5, 0.75)] * len(maps)
    return quantile_fuse(maps[:1], maps[1:], scales, 0.25, (shape[0], shape[1]), valid)


@given(boxes(), st.sampled_from([4, 8, 16]))
def test_each_pixel_reads_a_views_map_where_there_is_no_padding(
    case: tuple[tuple[int, int], list[int]], stride: int
) -> None:
    input_shape, (left, top, right, bottom) = case
    shape = (-(-input_shape[0] // stride), -(-input_shape[1] // stride))
    (mask,) = content_mask(torch.tensor([case[1]]), input_shape, shape).numpy()
    rows = nearest_positions(top, bottom, input_shape[0], shape[0])
    columns = nearest_positions(left, right, input_shape[1], shape[1])
    assert (len(rows), len(columns)) == input_shape
    assert mask[np.ix_(rows, columns)].all()
    assert {*rows} == {*np.flatnonzero(mask.any(axis=1))}
    assert {*columns} == {*np.flatnonzero(mask.any(axis=0))}


@given(boxes(), st.integers(0, 2**31), st.sampled_from(["product", "sum", "quantile"]))
def test_fuse_ignores_padding(case: tuple[tuple[int, int], list[int]], seed: int, method: FusionMethod) -> None:
    input_shape, (left, top, right, bottom) = case
    shapes = [(-(-input_shape[0] // stride), -(-input_shape[1] // stride)) for stride in (4, 8, 16)]
    valid = [content_mask(torch.tensor([case[1]]), input_shape, shape) for shape in shapes]
    maps, other = (random_maps(*shapes, images=1, seed=seed + i) for i in range(2))
    other = [torch.where(v, d, 1e6 * o) for v, d, o in zip(valid, maps, other, strict=True)]
    first, second = (fuse_any(method, d, valid, *input_shape)[:, top:bottom, left:right] for d in (maps, other))
    torch.testing.assert_close(first, second)
    for d, o, v in zip(maps, other, valid, strict=True):
        for given_maps in (d, o):
            # Every interpolated value lies within the range of valid values.
            raised = upsample(given_maps, input_shape, v)[:, top:bottom, left:right]
            assert d[v].min() - 1e-4 <= raised.min() <= raised.max() <= d[v].max() + 1e-4
    for d, o, v in zip(maps, other, valid, strict=True):
        for one, two in zip(sample_distances(d[None], v), sample_distances(o[None], v), strict=True):
            np.testing.assert_array_equal(one, two)


def score_all(
    held_out: list[Tensor], new: list[Tensor], levels: int, student_weight: float = 0.25, two_views: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Score held-out images, each with the scales of the others, and new images, as fitting and scoring do."""
    samples = sample_distances(on_one_grid(held_out, [None] * len(held_out)))
    # In one view, or the first half of the student's levels and of the banks in another.
    views = [[int(two_views and 2 * i < n) for i in range(n)] for n in (levels, len(held_out) - levels)]
    weights = map_weights(*views, student_weight)

    def scores(maps: list[Tensor], scales: Sequence[DistanceScale]) -> list[float]:
        fused = soft_maximum(fuse_views(on_one_grid(maps, [None] * len(maps)), weights, scales), 0.2)
        return whole_maps(upsample(fused, (32, 32))).scalars(0.02)[:, 2].tolist()

    without_each = leave_one_out_scales(samples, weights)
    held_out_scores = [scores([d[i : i + 1] for d in held_out], scales)[0] for i, scales in enumerate(without_each)]
    return np.array(held_out_scores), np.array(scores(new, fit_scales(samples, weights)))


# With the weight of 0.25, p-values of five images are valid at all rates but 0.5, where 0.56 of the images are below.
@pytest.mark.parametrize(
    ("n", "draws", "student_weight"),
    [(2, 500, 0.5), (5, 500, 0.5), (40, 100, 0.5), (2, 500, 0.25), (10, 300, 0.25), (40, 100, 0.25)],
)
@pytest.mark.parametrize("two_views", [False, True])
def test_p_values_of_new_normal_images_are_valid(n: int, draws: int, student_weight: float, two_views: bool) -> None:
    """Images differ in how anomalous they look, in parts of different scale, shape and tail."""
    rng = np.random.default_rng(n)
    new_images = 10
    p_values = []
    for _ in range(draws):
        maps = []
        for shape, scale, tail in (((8, 8), 1.0, 0.3), ((4, 4), 1000.0, 1.0), ((8, 8), 1e-3, 1.0), ((4, 4), 1.0, 2.0)):
            image = rng.lognormal(0.0, tail, (n + new_images, 1, 1))
            maps.append(torch.from_numpy((scale * image * rng.gamma(2.0, size=(n + new_images, *shape))).astype("f")))
        held_out, new = [d[:n] for d in maps], [d[n:] for d in maps]
        held_out_scores, new_scores = score_all(held_out, new, 2, student_weight, two_views)
        calibration = Calibration(np.sort(held_out_scores).astype(np.float32), HeatmapScale(0.0, 1.0))
        p_values.append(calibration.p_values(new_scores.astype(np.float32)))
    for rate in (1 / (n + 1), 0.05, 0.1, 0.2, 0.5):
        alarms = (np.array(p_values) <= rate + 1e-6).mean(axis=1)
        assert alarms.mean() <= rate + 4 * alarms.std() / np.sqrt(draws)
