"""The distances of images from other images, against a plain computation image by image."""

import numpy as np
import pytest
import torch

from stpm.method import outliers
from stpm.method.calibration import count_far, spreads_above
from stpm.method.outliers import neighbour_distances, score_images


def plain(
    descriptors: np.ndarray, valid: np.ndarray, neighbour: int, references: list[int] | None = None
) -> np.ndarray:
    """Compute what `neighbour_distances` does by NumPy."""
    compared = sorted(references or range(len(descriptors)))
    normal = descriptors[compared][valid[compared]]
    scale = np.sqrt(((normal - normal.mean(axis=0)) ** 2).mean(axis=0))
    found = np.zeros(valid.shape)
    for image, position in np.argwhere(valid):
        to_images = []
        for other in {*compared} - {image}:
            difference = (descriptors[other][valid[other]] - descriptors[image, position]) / scale
            to_images.append(min(np.linalg.norm(each) for each in difference))
        found[image, position] = sorted(to_images)[neighbour - 1]
    return found / np.sort(found[valid])[(valid.sum() - 1) // 2]


def draw(rng: np.random.Generator, count: int, positions: int = 5) -> torch.Tensor:
    """Draw descriptors whose channels depend on each other and differ in scale."""
    mixed = rng.normal(size=(count, positions, 4)) @ rng.normal(size=(4, 4)) * [1, 5, 0.2, 3] + 7
    return torch.from_numpy(mixed).float()


@pytest.mark.parametrize("queries", [1, 7, 512])
@pytest.mark.parametrize(("count", "neighbour"), [(2, 1), (3, 2), (9, 3), (30, 3)])
def test_distances_are_those_of_a_plain_computation(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, count: int, neighbour: int, queries: int
) -> None:
    monkeypatch.setattr(outliers, "_QUERIES", queries)
    descriptors = draw(rng, count)
    valid = rng.random((count, 5)) < 0.6
    valid[:, 2] = True
    for mask in (valid, np.ones_like(valid)):
        found = neighbour_distances(descriptors, torch.from_numpy(mask), 0)
        expected = plain(descriptors.numpy().astype(float), mask, neighbour)
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
    # What is on padding has no effect.
    changed = torch.where(torch.from_numpy(valid)[..., None], descriptors, 1e4)
    first, second = (neighbour_distances(each, torch.from_numpy(valid), 0) for each in (descriptors, changed))
    assert torch.equal(first, second)


def test_many_images_are_compared_with_some_at_random(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outliers, "_MAX_REFERENCES", 5 * 30)
    descriptors, valid = draw(rng, 60), torch.ones(60, 5, dtype=torch.bool)
    found = [neighbour_distances(descriptors, valid, seed) for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    references = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:30].tolist()
    expected = plain(descriptors.numpy().astype(float), valid.numpy(), 3, references)
    np.testing.assert_allclose(found[0], expected, rtol=2e-3, atol=2e-3)


def test_three_images_with_a_like_defect_do_not_hide_each_other(rng: np.random.Generator) -> None:
    descriptors = draw(rng, 40)
    for image in (3, 17, 30):
        descriptors[image, image % 5] = torch.tensor([60.0, -40, 9, 30]) + 0.01 * image
    scores = score_images(neighbour_distances(descriptors, torch.ones(40, 5, dtype=torch.bool), 0))
    assert {*scores.argsort(descending=True)[:3].tolist()} == {3, 17, 30}
    assert count_far(spreads_above(scores.numpy())) == 3
    assert count_far(spreads_above(scores[:9].numpy())) == 0


@pytest.mark.parametrize("odd", [0, 1])
def test_images_that_are_all_alike_have_finite_distances(odd: int) -> None:
    descriptors = torch.ones(9, 4, 3)
    descriptors[4, 2] += odd
    distances = neighbour_distances(descriptors, torch.ones(9, 4, dtype=torch.bool), 0)
    assert torch.isfinite(distances).all()
    assert bool(distances.any()) == bool(odd)


def test_a_score_is_the_mean_of_the_largest_quarter_and_few_lie_far() -> None:
    assert score_images(torch.tensor([[1.0, 9, 2, 5, 3, 4, 7, 8], [0, 0, 0, 0, 0, 0, 0, 4]])).tolist() == [8.5, 2.0]
    assert score_images(torch.tensor([[3.0, 1], [2, 5]])).tolist() == [3.0, 5.0]
    # None of an even spread lies far.
    spread = np.linspace(1, 2, 40, dtype=np.float32)
    assert count_far(spreads_above(spread)) == 0
    assert not spreads_above(np.zeros(40, np.float32)).any()
    # The upper quartile is one spread above the median, whose sign does not matter.
    for middle in (1.5, 0, -1.5):
        found = spreads_above(np.append(spread - 1.5, [1, 7.5]).astype(np.float32) + np.float32(middle))
        assert found[-1] == found.max()
        np.testing.assert_allclose(np.quantile(found, [0.5, 0.75]), [0, 1], atol=1e-5)
        assert count_far(found) == 1
