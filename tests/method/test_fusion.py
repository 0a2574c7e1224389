"""Anomaly maps and scores against plain numpy, written from the papers' text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor

from stpm.method.calibration import Calibration
from stpm.method.fusion import AnomalyMap, Distances, sample_distances, upsample
from stpm.method.fusion import fuse as fuse_distances
from stpm.method.loss import distance_map
from stpm.method.recipe import FusionMethod, Recipe
from stpm.method.scales import DistanceScale, HeatmapScale, fit_distance_scale, leave_one_out_scales
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


def fuse(
    student: list[Tensor],
    memory: list[Tensor],
    scales: Sequence[DistanceScale],
    method: FusionMethod,
    student_weight: float,
    input_shape: tuple[int, int],
    valid: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    recipe = Recipe(fusion=method, student_weight=student_weight)
    return fuse_distances(Distances(tuple(student), tuple(memory)), scales, recipe, input_shape, valid)


def test_fuse_product_matches_paper() -> None:
    teacher, student = features(0), features(1)
    expected = np.ones((2, 64, 48))
    for t, s in zip(teacher, student, strict=True):
        expected *= np.stack([reference_upsample(image, (64, 48)) for image in reference_distance(t, s)])
    maps = [distance_map(torch.from_numpy(t), torch.from_numpy(s)) for t, s in zip(teacher, student, strict=True)]
    total, *parts = fuse(maps, [], (), "product", 0.25, (64, 48), [None] * 3)
    np.testing.assert_allclose(total.numpy(), expected, atol=1e-5)
    assert parts == [None, None]
    for image, reference in zip(total.numpy(), expected, strict=True):
        score = AnomalyMap(image).score(0.0)
        assert score.total == pytest.approx(reference.max(), abs=1e-5)
        assert (score.student, score.memory) == (None, None)


def test_fuse_sum_adds_upsampled_maps() -> None:
    distances = random_maps((4, 6), (8, 5))
    expected = sum(reference_upsample(d[0].numpy(), (16, 24)) for d in distances)
    total, student, memory = fuse(distances, [], (), "sum", 0.25, (16, 24), [None] * 2)
    np.testing.assert_allclose(total[0].numpy(), expected, atol=1e-6)
    torch.testing.assert_close(student, total)
    assert memory is None


@pytest.mark.parametrize(("levels", "banks"), [(2, 3), (0, 3), (2, 0), (1, 1)])
@pytest.mark.parametrize("student_weight", [0.25, 0.6])
def test_fuse_quantile_averages_student_and_memory_by_their_weights(
    levels: int, banks: int, student_weight: float
) -> None:
    maps = random_maps(*[(8 - i, 4 + i) for i in range(levels + banks)])
    # A spread of 0 is replaced by a twentieth of the high quantile.
    scales = [DistanceScale(0.1 * i, 0.1 * i + 0.5) if i else DistanceScale(2.0, 2.0) for i in range(levels + banks)]
    scaled = [
        reference_upsample((d[0].numpy() - s.low) / (s.high - s.low or 0.1), (32, 20))
        for d, s in zip(maps, scales, strict=True)
    ]
    total, *parts = fuse(maps[:levels], maps[levels:], scales, "quantile", student_weight, (32, 20), [None] * len(maps))
    weights = (student_weight, 1 - student_weight) if levels and banks else (1.0, 1.0)
    expected = [
        weight * np.mean(own, axis=0) if own else None
        for weight, own in zip(weights, (scaled[:levels], scaled[levels:]), strict=True)
    ]
    np.testing.assert_allclose(total[0].numpy(), sum(e for e in expected if e is not None), rtol=1e-4, atol=1e-5)
    for part, reference in zip(parts, expected, strict=True):
        assert (part is None) == (reference is None)
        if part is not None:
            np.testing.assert_allclose(part[0].numpy(), reference, rtol=1e-4, atol=1e-5)


@given(st.floats(0.3, 4.0), st.integers(13, 40), st.integers(13, 40))
@settings(max_examples=30)
def test_smoothed_matches_gaussian_with_repeated_borders(sigma: float, height: int, width: int) -> None:
    (maps,) = random_maps((height, width))
    image = maps[0].numpy()
    radius = int(3 * sigma + 0.5)
    kernel = np.exp(-np.square(np.arange(-radius, radius + 1)) / (2 * sigma**2))
    padded = np.pad(image.astype(np.float64), radius, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * radius + 1, 2 * radius + 1))
    expected = np.einsum("hwyx,y,x->hw", windows, kernel / kernel.sum(), kernel / kernel.sum())
    np.testing.assert_allclose(AnomalyMap(image).smoothed(sigma).total, expected, atol=1e-5)


def test_smoothed_keeps_sum_of_parts_and_sigma_0_changes_nothing() -> None:
    student, memory = (each[0].numpy() for each in random_maps((20, 30), (20, 30)))
    plain = AnomalyMap(student + memory, student, memory)
    smoothed = plain.smoothed(2.0)
    assert smoothed.student is not None
    assert smoothed.memory is not None
    np.testing.assert_allclose(smoothed.student + smoothed.memory, smoothed.total, atol=1e-5)
    assert plain.smoothed(0.0) is plain
    assert AnomalyMap(student).smoothed(1.0).memory is None


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0, 0.99), st.integers(0, 1000))
def test_score_is_mean_of_highest_pixels_and_sum_of_parts(height: int, width: int, fraction: float, seed: int) -> None:
    student, memory = np.random.default_rng(seed).normal(size=(2, height, width)).astype(np.float32)
    total = student + memory
    score = AnomalyMap(total, student, memory).score(fraction)
    count = max(round(fraction * total.size), 1)
    order = np.argsort(total.ravel())[::-1][:count]
    assert score.total == pytest.approx(total.ravel()[order].mean(), abs=1e-5)
    assert score.student == pytest.approx(student.ravel()[order].mean(), abs=1e-5)
    assert score.memory == pytest.approx(memory.ravel()[order].mean(), abs=1e-5)
    assert score.student + score.memory == pytest.approx(score.total, abs=1e-5)


def test_sample_distances_are_evenly_spaced_over_valid_positions() -> None:
    distances = torch.arange(2 * 50 * 40.0).reshape(2, 50, 40)
    for image, values in zip(distances, sample_distances(distances), strict=True):
        assert len(values) == 1024
        assert (values[0], values[-1]) == (image.min(), image.max())
        assert set(np.diff(values)) == {1.0, 2.0}
    valid = torch.zeros(2, 50, 40, dtype=torch.bool)
    valid[0, :30] = valid[1, 7, 3] = True
    first, second = sample_distances(distances, valid)
    assert (len(first), first[0], first[-1]) == (1024, 0.0, 1199.0)
    assert second.tolist() == [distances[1, 7, 3].item()]
    for image, values in zip(distances[:, :5], sample_distances(distances[:, :5]), strict=True):
        np.testing.assert_array_equal(values, image.numpy().ravel())


@given(boxes(), st.integers(0, 2**31), st.sampled_from(["product", "sum", "quantile"]))
def test_fuse_ignores_padding(case: tuple[tuple[int, int], list[int]], seed: int, method: FusionMethod) -> None:
    input_shape, (left, top, right, bottom) = case
    shapes = [(-(-input_shape[0] // stride), -(-input_shape[1] // stride)) for stride in (4, 8, 16)]
    valid = [content_mask(torch.tensor([case[1]]), input_shape, shape) for shape in shapes]
    maps, other = (random_maps(*shapes, images=1, seed=seed + i) for i in range(2))
    other = [torch.where(v, d, 1e6 * o) for v, d, o in zip(valid, maps, other, strict=True)]
    scales = [DistanceScale(0.5, 0.75)] * 3
    levels = 1 if method == "quantile" else 3
    first, second = (
        fuse(d[:levels], d[levels:], scales, method, 0.25, input_shape, valid)[0][:, top:bottom, left:right]
        for d in (maps, other)
    )
    torch.testing.assert_close(first, second)
    for d, o, v in zip(maps, other, valid, strict=True):
        for given_maps in (d, o):
            # Every interpolated value lies within the range of valid values.
            raised = upsample(given_maps, input_shape, v)[:, top:bottom, left:right]
            assert d[v].min() - 1e-4 <= raised.min() <= raised.max() <= d[v].max() + 1e-4
    for d, o, v in zip(maps, other, valid, strict=True):
        for one, two in zip(sample_distances(d, v), sample_distances(o, v), strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("method", ["product", "sum", "quantile"])
def test_fuse_with_full_mask_equals_no_mask(method: FusionMethod) -> None:
    maps = random_maps((8, 6), (4, 3))
    everything = [torch.ones_like(d, dtype=torch.bool) for d in maps]
    scales = [DistanceScale(0.5, 0.9)] * 2
    first, second = (fuse(maps, [], scales, method, 0.25, (32, 24), v)[0] for v in (everything, [None] * 2))
    torch.testing.assert_close(first, second)


def score_all(
    held_out: list[Tensor], new: list[Tensor], levels: int, student_weight: float = 0.25
) -> tuple[np.ndarray, np.ndarray]:
    """Score held-out images, each with the scales of the others, and new images, as fitting and scoring do."""
    input_shape, valid = (32, 32), [None] * len(new)
    values = [sample_distances(d) for d in held_out]

    def scores(maps: list[Tensor], scales: list[DistanceScale]) -> list[float]:
        total, *_ = fuse(maps[:levels], maps[levels:], scales, "quantile", student_weight, input_shape, valid)
        return [AnomalyMap(each).score(0.02).total for each in total.numpy()]

    without_each = zip(*map(leave_one_out_scales, values), strict=True)
    held_out_scores = [scores([d[i : i + 1] for d in held_out], scales)[0] for i, scales in enumerate(without_each)]
    return np.array(held_out_scores), np.array(scores(new, [fit_distance_scale(part) for part in values]))


@pytest.mark.parametrize("factor", [1000.0, 1e-3])
@pytest.mark.parametrize("part", range(3))
def test_fuse_quantile_is_independent_of_a_parts_unit(part: int, factor: float) -> None:
    held_out, new = (random_maps((8, 8), (4, 4), (8, 8), images=6, seed=seed) for seed in (1, 2))
    expected = score_all(held_out, new, 1)
    scaled = [[factor * d if i == part else d for i, d in enumerate(maps)] for maps in (held_out, new)]
    for found, before in zip(score_all(*scaled, 1), expected, strict=True):
        np.testing.assert_allclose(found, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clear", range(4))
@pytest.mark.parametrize("heavy", [False, True])
def test_fuse_quantile_keeps_signal_of_one_part_among_noisy_ones(clear: int, heavy: bool) -> None:
    """One map of four responds to the defects; the others, of the same weight, are noise on larger scales."""
    rng = np.random.default_rng(clear)

    def maps(images: int, defects: bool) -> list[Tensor]:
        noise = rng.exponential(size=(4, images, 16, 16)) if heavy else np.abs(rng.normal(size=(4, images, 16, 16)))
        noise *= np.array([1.0, 100.0, 1e-3, 7.0]).reshape(4, 1, 1, 1)
        if defects:
            noise[clear, :, 4:7, 4:7] *= 12
        return list(torch.from_numpy(noise.astype(np.float32)))

    held_out, good, bad = maps(10, False), maps(40, False), maps(40, True)
    new = [torch.cat(pair) for pair in zip(good, bad, strict=True)]
    _, scores = score_all(held_out, new, 2, student_weight=0.5)
    assert roc_auc_score([0] * 40 + [1] * 40, scores) > 0.95


# With the weight of 0.25, p-values of five images are valid at all rates but 0.5, where 0.56 of the images are below.
@pytest.mark.parametrize(
    ("n", "draws", "student_weight"),
    [(2, 500, 0.5), (5, 500, 0.5), (40, 100, 0.5), (2, 500, 0.25), (10, 300, 0.25), (40, 100, 0.25)],
)
def test_p_values_of_new_normal_images_are_valid(n: int, draws: int, student_weight: float) -> None:
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
        held_out_scores, new_scores = score_all(held_out, new, 2, student_weight)
        calibration = Calibration(np.sort(held_out_scores).astype(np.float32), HeatmapScale(0.0, 1.0))
        p_values.append(calibration.p_values(new_scores.astype(np.float32)))
    for rate in (1 / (n + 1), 0.05, 0.1, 0.2, 0.5):
        alarms = (np.array(p_values) <= rate + 1e-6).mean(axis=1)
        assert alarms.mean() <= rate + 4 * alarms.std() / np.sqrt(draws)
