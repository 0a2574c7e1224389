"""Memory banks against plain numpy, scipy and brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from torch import Tensor

from stpm.method.memory_bank import (
    KINDS,
    DescriptorSpec,
    Kind,
    MemoryBank,
    fit_bank,
    fit_whitening,
    greedy_coreset,
    grid_positions,
    nearest_distance,
    stride_of,
    strided_shape,
    window_size,
)
from stpm.method.teacher import content_mask


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def describe(features: Tensor, kind: Kind, window: int, stride: int, valid: Tensor | None = None) -> Tensor:
    return DescriptorSpec(0, kind, window, stride).describe(features, valid)


def make_bank(features: Tensor, kind: Kind, count: int) -> MemoryBank:
    spec = DescriptorSpec(0, kind, 1, 1)
    return fit_bank(spec.describe(features).flatten(0, 2), spec, count, 0)[0]


def correlated(count: int, channels: int, seed: int = 0) -> Tensor:
    """Draw correlated descriptors with a mean, whose channels differ in scale by a thousand."""
    scales = torch.logspace(-1.5, 1.5, channels)
    return (normal(count, channels, seed=seed) * scales) @ normal(channels, channels, seed=seed + 1) + 5


def reference_description(
    features: np.ndarray, kind: Kind, window: int, stride: int, valid: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Average the valid positions of the window by loops, and mark the descriptors that have one."""
    images, channels, height, width = features.shape
    margin = (window - stride) // 2
    rows, columns = range(0, height, stride), range(0, width, stride)
    found = np.zeros((images, len(rows), len(columns), channels))
    described = np.zeros((images, len(rows), len(columns)), bool)
    for i, y, x in np.ndindex(described.shape):
        window_of_image = [
            features[i, :, v, u]
            for v in range(max(rows[y] - margin, 0), min(rows[y] - margin + window, height))
            for u in range(max(columns[x] - margin, 0), min(columns[x] - margin + window, width))
            if valid[i, v, u]
        ]
        described[i, y, x] = bool(window_of_image)
        if window_of_image:
            mean = np.mean(window_of_image, axis=0)
            found[i, y, x] = mean / np.linalg.norm(mean) if kind == "directions" else mean
    return found, described


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("margin", [0, 1, 2])
@pytest.mark.parametrize(("masked", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.float16)])
@pytest.mark.parametrize(
    ("stride", "shape"), [(1, (7, 6)), (1, (2, 9)), (1, (1, 1)), (2, (8, 6)), (4, (7, 13)), (2, (1, 1))]
)
def test_describe_averages_valid_positions_of_window(
    kind: Kind, margin: int, masked: bool, dtype: torch.dtype, stride: int, shape: tuple[int, int]
) -> None:
    features = normal(2, 5, *shape).to(dtype)
    valid = torch.ones(2, *shape, dtype=torch.bool)
    if masked:
        valid[0, :, : shape[1] // 2] = False
        valid[1, shape[0] // 2 + 1 :] = False
    window = stride + 2 * margin
    expected, described = reference_description(features.double().numpy(), kind, window, stride, valid.numpy())
    found = describe(features, kind, window, stride, valid if masked else None)
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    np.testing.assert_allclose(found.numpy()[described], expected[described], atol=1e-5)


@pytest.mark.parametrize(("pixels", "stride"), [(1, 8), (2, 4), (4, 2), (8, 1), (16, 1), (32, 1)])
@given(rows=st.integers(32, 1000), columns=st.integers(32, 1000))
def test_descriptors_are_eight_pixels_apart_or_more(pixels: int, stride: int, rows: int, columns: int) -> None:
    shape = -(-rows // pixels), -(-columns // pixels)
    assert stride_of(shape, (rows, columns)) == stride


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 8), st.integers(1, 8), st.sampled_from([1, 2, 4, 8]))
def test_window_is_the_smallest_of_the_parity(rows: int, columns: int, across: int, down: int, stride: int) -> None:
    window = window_size((rows * down, columns * across), (rows, columns), stride)
    assert (window - stride) % 2 == 0
    least = max(across, down, 3 * stride - 2)
    assert least <= window <= least + 1


@pytest.mark.parametrize("pixels", [1, 2, 4, 8])
@settings(max_examples=300)
@given(
    input_shape=st.tuples(st.integers(32, 300), st.integers(32, 300)),
    corner=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    part=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    is_alone=st.booleans(),
)
def test_every_valid_descriptor_averages_a_valid_position(
    pixels: int, input_shape: tuple[int, int], corner: tuple[float, float], part: tuple[float, float], is_alone: bool
) -> None:
    """No part of an image is represented by its padding, whatever the content box, and no part is left out."""
    (top, bottom), (left, right) = (
        (start := min(int(side * begin), side - 1), min(max(start + round(side * share), start + 1), side))
        for side, begin, share in zip(input_shape, corner, part, strict=True)
    )
    box = torch.tensor([[left, top, right, bottom]])
    shape = -(-input_shape[0] // pixels), -(-input_shape[1] // pixels)
    coarsest = shape if is_alone else (-(-input_shape[0] // 16), -(-input_shape[1] // 16))
    stride = stride_of(shape, input_shape)
    window = window_size(shape, coarsest, stride)
    fine, strided = content_mask(box, input_shape, shape), content_mask(box, input_shape, strided_shape(shape, stride))
    # Valid positions hold 1, padding 0: an average of padding alone is 0.
    described = describe(fine[:, None].float(), "features", window, stride, fine)[..., 0]
    torch.testing.assert_close(described[strided], torch.ones_like(described[strided]))
    # Each position is in a window.
    alone = describe(torch.ones(1, 1, *shape), "features", window, stride)
    assert window >= stride
    assert alone.shape[1:3] == strided_shape(shape, stride)


@pytest.mark.parametrize(("pixels", "ratio"), [(4, 4), (2, 8), (1, 16), (8, 2), (4, 1)])
def test_a_descriptor_is_centred_on_what_it_stands_for(pixels: int, ratio: int) -> None:
    """The window's average of a coordinate, brought to input size, is that coordinate: maps are not shifted."""
    side = 128
    shape = side // pixels, side // pixels
    stride = stride_of(shape, (side, side))
    window = window_size(shape, (shape[0] // ratio, shape[1] // ratio), stride)
    centres = (torch.arange(shape[1]) + 0.5) * pixels
    described = describe(centres.expand(1, 1, *shape).contiguous(), "features", window, stride)[0, :, :, 0]
    cells = (torch.arange(described.shape[1]) + 0.5) * side / described.shape[1]
    inner = slice(window, -window) if len(cells) > 2 * window else slice(len(cells) // 2, len(cells) // 2 + 1)
    torch.testing.assert_close(described[:, inner], cells[inner].expand_as(described[:, inner]))


def test_fit_whitening_gives_unit_covariance_up_to_ridge() -> None:
    descriptors = correlated(5000, 6)
    mean, whitening = fit_whitening(descriptors)
    wide = descriptors.double().numpy()
    np.testing.assert_allclose(mean.numpy(), wide.mean(axis=0), rtol=1e-5)
    found = (wide - wide.mean(axis=0)) @ whitening.double().numpy()
    variances = np.linalg.eigvalsh(np.cov(wide.T, bias=True))
    expected = variances / (variances + 0.01 * variances.mean())
    np.testing.assert_allclose(np.cov(found.T, bias=True), np.diag(expected), atol=1e-3)
    assert expected.max() > 0.98


def as_features(descriptors: Tensor) -> Tensor:
    """Reshape descriptors (N, C) to the features of one image, (1, C, N, 1)."""
    return descriptors.T[None, :, :, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 300.7])
@pytest.mark.parametrize("constant", ["a channel", "all but one", "all"])
def test_fit_bank_gives_finite_distances_for_constant_channels(kind: Kind, value: float, constant: str) -> None:
    descriptors = normal(300, 4).abs()
    descriptors[:, {"a channel": slice(1), "all but one": slice(3), "all": slice(4)}[constant]] = value
    bank = make_bank(as_features(descriptors), kind, count=50)
    for tensor in (bank.mean, bank.whitening, bank.vectors):
        assert torch.isfinite(tensor).all()
    # Nothing overflows when a distance is squared.
    assert bank.distance_map(as_features(descriptors)).max() < (0.02 if constant == "all" else 1e3)
    assert bank.distance_map(as_features(descriptors + normal(300, 4, seed=1))).max() < 1e12


def reference_coreset(points: np.ndarray, count: int) -> list[int]:
    chosen = [int(np.linalg.norm(points - points.mean(axis=0), axis=1).argmin())]
    while len(chosen) < count:
        nearest = [min(np.linalg.norm(point - points[k]) for k in chosen) for point in points]
        chosen.append(int(np.argmax(nearest)))
    return chosen


@pytest.mark.parametrize("channels", [1, 3, 32])
def test_greedy_coreset_adds_farthest_vector(channels: int) -> None:
    points = normal(60, channels)
    assert greedy_coreset(points, 20, 0).tolist() == reference_coreset(points.double().numpy(), 20)


def test_greedy_coreset_covers_clusters_after_projection() -> None:
    """From 15 clusters in 100 dimensions, it chooses one vector of each."""
    centres = 10 * normal(15, 100, seed=1)
    points = (centres[:, None] + 0.1 * normal(15, 20, 100)).flatten(0, 1)
    for seed in range(3):
        chosen = greedy_coreset(points, 15, seed)
        assert sorted((chosen // 20).tolist()) == list(range(15))
        assert torch.equal(chosen, greedy_coreset(points, 15, seed))


@pytest.mark.parametrize("channels", [2, 50])
def test_greedy_coreset_chooses_no_index_twice(channels: int) -> None:
    points = normal(4, channels).repeat(25, 1)
    chosen = greedy_coreset(points, 99, 0).tolist()
    assert len(set(chosen)) == len(chosen) == 99
    assert {k % 4 for k in chosen[:4]} == {0, 1, 2, 3}


@pytest.mark.parametrize(("queries", "vectors", "channels"), [(2500, 300, 20), (1024, 1, 3), (1025, 7, 100), (1, 5, 1)])
def test_nearest_distance_matches_brute_force(queries: int, vectors: int, channels: int) -> None:
    q, v = normal(queries, channels), normal(vectors, channels, seed=1)
    expected = cdist(q.double().numpy(), v.double().numpy()).min(axis=1)
    np.testing.assert_allclose(nearest_distance(q, v).numpy(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("knows_position", [False, True])
@pytest.mark.parametrize(("window", "stride"), [(1, 1), (3, 1), (4, 2)])
def test_distance_map_matches_reference_at_each_position(
    kind: Kind, window: int, stride: int, knows_position: bool
) -> None:
    spec, seen = DescriptorSpec(0, kind, window, stride), normal(4, 6, 8, 8)
    descriptors = spec.describe(seen)
    positions = grid_positions(descriptors.shape[1:3], torch.device("cpu")).repeat(4, 1) if knows_position else None
    bank, _ = fit_bank(descriptors.flatten(0, 2), spec, 20, 0, positions=positions)
    assert torch.equal(bank.vectors, bank.vectors.half().float())
    features, valid = normal(2, 6, 6, 8, seed=1), torch.ones(2, 6, 8, dtype=torch.bool)
    valid[:, :, 4:] = False
    found = bank.distance_map(features, valid)
    assert (found.shape, found.dtype) == ((2, 6 // stride, 8 // stride), torch.float32)
    described, is_known = reference_description(features.double().numpy(), kind, window, stride, valid.numpy())
    whitened = (described - bank.mean.numpy()) @ bank.whitening.double().numpy()
    if knows_position:
        # The longer side is 8 of the level's positions; 4 √C is the weight of a position.
        rows, columns = ((np.arange(side // stride) + 0.5) * stride / 8 for side in (6, 8))
        places = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1) * 4 * np.sqrt(6)
        whitened = np.concatenate([whitened, np.broadcast_to(places, (2, *places.shape))], axis=-1)
    expected = cdist(whitened[is_known], bank.vectors.double().numpy()).min(axis=1)
    np.testing.assert_allclose(found.numpy()[is_known], expected, rtol=1e-3)
