"""The distances of images from other images, against a plain computation image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stpm.method import suspects
from stpm.method.suspects import neighbour_distances


def plain(
    descriptors: np.ndarray, valid: np.ndarray, neighbour: int, references: list[int] | None = None
) -> np.ndarray:
    """Compute what `neighbour_distances` does by NumPy, by the inverse of the covariance with its ridge."""
    normal = descriptors[valid]
    covariance = np.cov(normal.T, bias=True)
    inverse = np.linalg.inv(covariance + 0.01 * np.trace(covariance) / len(covariance) * np.eye(len(covariance)))
    found = np.zeros(valid.shape)
    for image, position in np.argwhere(valid):
        to_images = []
        for other in set(references or range(len(descriptors))) - {image}:
            difference = descriptors[other][valid[other]] - descriptors[image, position]
            to_images.append(min(np.sqrt(each @ inverse @ each) for each in difference))
        found[image, position] = sorted(to_images)[neighbour - 1]
    return found / np.sort(found[valid])[(valid.sum() - 1) // 2]


def draw(rng: np.random.Generator, count: int, positions: int = 5) -> torch.Tensor:
    """Draw descriptors whose channels depend on each other and differ in scale."""
    mixed = rng.normal(size=(count, positions, 4)) @ rng.normal(size=(4, 4)) * [1, 5, 0.2, 3] + 7
    return torch.from_numpy(mixed).float()


@pytest.mark.parametrize("queries", [1, 7, 512])
@pytest.mark.parametrize(("count", "neighbour"), [(2, 1), (3, 2), (9, 3), (70, 4)])
def test_distances_are_those_of_a_plain_computation(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, count: int, neighbour: int, queries: int
) -> None:
    monkeypatch.setattr(suspects, "_QUERIES", queries)
    descriptors = draw(rng, count)
    valid = rng.random((count, 5)) < 0.6
    valid[:, 2] = True
    for mask in (valid, np.ones_like(valid)):
        given = None if mask.all() else torch.from_numpy(mask)
        expected = plain(descriptors.numpy().astype(float), mask, neighbour)
        np.testing.assert_allclose(neighbour_distances(descriptors, given, 0), expected, rtol=2e-3, atol=2e-3)
    # What is on padding has no effect.
    changed = torch.where(torch.from_numpy(valid)[..., None], descriptors, 1e4)
    first, second = (neighbour_distances(each, torch.from_numpy(valid), 0) for each in (descriptors, changed))
    assert torch.equal(first, second)


def test_many_images_are_compared_with_some_that_the_seed_chooses(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suspects, "_MAX_REFERENCES", 5 * 30)
    descriptors = draw(rng, 60)
    assert torch.equal(neighbour_distances(descriptors, None, 1), neighbour_distances(descriptors, None, 1))
    assert not torch.equal(neighbour_distances(descriptors, None, 1), neighbour_distances(descriptors, None, 2))
    chosen: list[list[int]] = []
    original = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: (chosen.append(original(*a, **k)), chosen[-1])[1])
    found = neighbour_distances(descriptors, None, 1)
    references = chosen[1][:30].tolist()
    expected = plain(descriptors.numpy().astype(float), np.ones((60, 5), bool), 3, references)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_three_images_with_a_like_defect_do_not_hide_each_other(rng: np.random.Generator) -> None:
    descriptors = draw(rng, 40)
    for image in (3, 17, 30):
        descriptors[image, image % 5] = torch.tensor([60.0, -40, 9, 30]) + 0.01 * image
    farthest = neighbour_distances(descriptors, None, 0).amax(dim=1)
    assert set(farthest.argsort(descending=True)[:3].tolist()) == {3, 17, 30}


@pytest.mark.parametrize("odd", [0, 1])
def test_images_that_are_all_alike_have_finite_distances(odd: int) -> None:
    descriptors = torch.ones(9, 4, 3)
    descriptors[4, 2] += odd
    distances = neighbour_distances(descriptors, None, 0)
    assert torch.isfinite(distances).all()
    assert bool(distances.any()) == bool(odd)
