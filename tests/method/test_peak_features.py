"""The vector of a peak against descriptors of whole maps."""

from itertools import product

import numpy as np
import pytest
import torch

from stpm.method.memory_bank import DescriptorSpec, MemoryBank
from stpm.method.peak_features import DIMENSIONS, peak_features
from stpm.method.teacher import content_mask, spatial_shape

SHAPE = (48, 64)
# Height, width, window and stride of the descriptors of three levels.
LEVELS = ((24, 32, 4, 2), (12, 16, 3, 1), (6, 8, 1, 1))


def make_banks(rng: np.random.Generator) -> list[MemoryBank]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=shape).astype(np.float32))

    return [
        MemoryBank(DescriptorSpec(index, kind, window, stride), draw(8), draw(8, 8), draw(2, 8))
        for index, (_, _, window, stride) in enumerate(LEVELS)
        for kind in ("features", "directions")
    ]


@pytest.mark.parametrize("content", [(0, 0, 64, 48), (9, 5, 50, 41), (30, 20, 31, 21)])
def test_a_vector_is_the_projection_of_the_whitened_descriptors_at_the_peak(content: tuple[int, int, int, int]) -> None:
    rng = np.random.default_rng(0)
    banks = make_banks(rng)
    features = [torch.from_numpy(rng.normal(size=(8, height, width))).bfloat16() for height, width, *_ in LEVELS]
    left, top, right, bottom = content
    masks = [content_mask(torch.tensor([content]), SHAPE, spatial_shape(level)) for level in features]
    found, expected = [], []
    for x, y in product((0, (right - left) // 2, right - left - 1), (0, (bottom - top) // 2, bottom - top - 1)):
        vector = peak_features(banks, features, (left + x, top + y), content, SHAPE)
        assert vector is not None
        found.append(vector.numpy())
        parts = []
        for level, mask, bank, (height, width, _, stride) in zip(features, masks, banks[::2], LEVELS, strict=True):
            described = bank.spec.describe(level[None], mask)[0]
            # The nearest position that is not padding.
            ys, xs = np.nonzero(mask[0].numpy())
            near = np.abs((ys + 0.5) * 48 / height - top - y - 0.5) + np.abs((xs + 0.5) * 64 / width - left - x - 0.5)
            row, column = ys[near.argmin()] // stride, xs[near.argmin()] // stride
            whitened = ((described[row, column] - bank.mean) @ bank.whitening).numpy()
            parts.append(whitened / np.linalg.norm(whitened))
        expected.append(np.concatenate(parts))
    vectors = np.stack(found)
    assert vectors.shape == (9, DIMENSIONS)
    assert np.array_equal(vectors, vectors.astype(np.float16))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    matrix = torch.randn(24, DIMENSIONS, generator=torch.Generator().manual_seed(0)).numpy()
    projected = np.stack(expected) @ matrix
    np.testing.assert_allclose(vectors, projected / np.linalg.norm(projected, axis=1, keepdims=True), atol=2e-3)


def test_a_model_without_memory_has_none() -> None:
    assert peak_features([], [torch.zeros(8, 3, 4)], (0, 0), (0, 0, 64, 48), SHAPE) is None
