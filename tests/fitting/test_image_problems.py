from __future__ import annotations

import numpy as np
import pytest

from stpm.data.image_statistics import COMPARED
from stpm.fitting.image_problems import find_image_problems, find_outlier, scale_range
from stpm.fitting.training_images import TrainingImages
from tests.conftest import make_preprocessing

BRIGHTNESS = COMPARED.index("brightness")


def make_images(*sizes: tuple[int, int], brightness: float = 100.0) -> TrainingImages:
    """Make images of these sizes (width, height), each of another brightness. Their pixels are not needed."""
    statistics = np.zeros((len(sizes), len(COMPARED)), np.float32)
    statistics[:, :2] = sizes
    statistics[:, BRIGHTNESS] = brightness + np.arange(len(sizes)) / len(sizes)
    return TrainingImages(np.empty((len(sizes), 1, 1, 3), np.uint8), np.empty((len(sizes), 4), np.int32), statistics)


def problems(images: TrainingImages) -> list[str]:
    return find_image_problems(images, make_preprocessing(256, 256, "fit"))


def test_nothing_is_wrong_with_ordinary_images() -> None:
    assert problems(make_images(*[(1024, 1024)] * 20, (900, 1000))) == []


def test_almost_black_images_are_reported() -> None:
    (problem,) = problems(make_images(*[(512, 512)] * 20, brightness=14.5))
    assert problem.startswith("all images are almost black (mean brightness at most 15 of 255); if these are values")
    for column, value in ((BRIGHTNESS, 40.0), (COMPARED.index("contrast"), 1.5)):
        # One image is brighter, or has bright parts.
        images = make_images(*[(512, 512)] * 20, brightness=14.5)
        images.statistics[7, column] = value
        assert problems(images) == []


def test_copies_are_reported() -> None:
    images = make_images(*[(512, 512)] * 20)
    images.statistics[[3, 5, 9]] = images.statistics[4]
    (problem,) = problems(images)
    assert problem.startswith("3 of 20 images are copies of others; remove them")


def test_images_that_turn_are_reported() -> None:
    wide = make_preprocessing(192, 768, "fit")
    images = make_images(*[(1600, 400)] * 12, *[(400, 1600)] * 8)
    assert scale_range(images, wide) == (192 / 1600, 768 / 1600)
    (problem,) = find_image_problems(images, wide)
    assert "the model sees them at 12% to 48% of their size" in problem


@pytest.mark.parametrize("count", [10, 20, 100])
def test_an_image_far_above_all_others_is_named(count: int) -> None:
    # Quantiles of an exponential distribution.
    scores = -np.log1p(-(np.arange(count) + 0.5) / count).astype(np.float32)[::-1].copy()
    uris = [f"/good/{number}.png" for number in range(count)]
    assert find_outlier(scores, uris) == ""
    scores[3] = scores.max() * 8
    assert find_outlier(scores, uris).startswith(f"look at /good/3.png: it scores {scores[3]:.3g}, all other good")


def test_nine_scores_are_too_few_for_an_outlier() -> None:
    assert find_outlier(np.array([1.0] * 8 + [99.0], np.float32), [str(i) for i in range(9)]) == ""
