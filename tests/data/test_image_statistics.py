from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageFilter

from stpm.data.image_statistics import NAMES, ImageStatistics, compute_statistics


def compute(pixels: np.ndarray) -> ImageStatistics:
    return compute_statistics(Image.fromarray(pixels))


def grey_square(x: int, y: int, side: int = 256, level: int = 180) -> np.ndarray:
    """Draw a square of 64 pixels with its centre at (x, y) on a dark background."""
    pixels = np.full((side, side, 3), 30, np.uint8)
    pixels[y - 32 : y + 32, x - 32 : x + 32] = level
    return pixels


@given(arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))))
def test_every_image_has_finite_statistics_in_their_ranges(pixels: np.ndarray) -> None:
    found = compute(pixels)
    assert np.isfinite(found).all()
    assert min(found) >= 0
    assert found.brightness <= 255
    assert max(found.position_x, found.position_y) <= 1


def test_means_are_those_of_all_pixels(rng: np.random.Generator) -> None:
    """With one sample per pixel, the statistics are exact."""
    pixels = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
    found = compute(pixels)
    red, green, blue = pixels.reshape(-1, 3).mean(0)
    assert found.brightness == pytest.approx(0.299 * red + 0.587 * green + 0.114 * blue, abs=0.5)
    assert found.red_to_green == pytest.approx((red + 1) / (green + 1), rel=0.01)
    assert found.blue_to_green == pytest.approx((blue + 1) / (green + 1), rel=0.01)


def test_sharpness_is_the_ratio_of_the_energies_of_fine_and_coarse_differences(rng: np.random.Generator) -> None:
    """In an image of few rows and columns, all of them are taken."""
    green = rng.integers(0, 256, (32, 32)).astype(np.uint8)
    values = green.astype(float)
    fine, coarse = (
        ((values[d:] - values[:-d]) ** 2).mean() + ((values[:, d:] - values[:, :-d]) ** 2).mean() for d in (1, 8)
    )
    assert compute(np.stack([green] * 3, axis=-1)).sharpness == pytest.approx(fine / coarse)


@pytest.mark.parametrize(("kind", "expected"), [("ramp", 1 / 64), ("edge", 1 / 8), ("noise", 1.0)])
def test_sharpness_of_a_ramp_an_edge_and_noise(rng: np.random.Generator, kind: str, expected: float) -> None:
    column = {"ramp": np.arange(200), "edge": np.where(np.arange(200) < 100, 20, 200), "noise": np.zeros(200)}[kind]
    pixels = np.repeat(np.tile(column, (200, 1)).astype(np.uint8)[..., None], 3, axis=2)
    if kind == "noise":
        pixels[:] = rng.integers(0, 256, (200, 200, 1))
    assert compute(pixels).sharpness == pytest.approx(expected, rel=0.05)


def test_content_is_found_where_it_is_and_moves_by_what_the_camera_moved() -> None:
    middle, moved = compute(grey_square(128, 100)), compute(grey_square(141, 100))
    assert (middle.position_x, middle.position_y) == pytest.approx((0.5, 100 / 256), abs=0.01)
    assert moved.position_x - middle.position_x == pytest.approx(13 / 256, abs=0.004)
    assert moved.position_y == pytest.approx(middle.position_y)


@pytest.mark.parametrize("side", [64, 300, 900])
def test_each_fault_of_a_camera_changes_its_own_statistic_most(side: int, rng: np.random.Generator) -> None:
    grain = rng.normal(0, 8, (side, side, 1))
    pixels = np.clip(np.kron(grey_square(128, 128), np.ones((4, 4, 1)))[:: 1024 // side, :: 1024 // side], 0, 255)
    pixels = np.clip(pixels[:side, :side] + grain[: len(pixels), : len(pixels)], 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    before = compute_statistics(image)
    brighter = compute((pixels * 1.1).clip(0, 255).astype(np.uint8))
    blurred = compute_statistics(image.filter(ImageFilter.GaussianBlur(1)))
    redder = compute((pixels * [1.1, 1, 1]).clip(0, 255).astype(np.uint8))
    assert largest_change(before, brighter) == "brightness"
    assert largest_change(before, blurred) == "sharpness"
    assert largest_change(before, redder) == "red_to_green"


def largest_change(before: ImageStatistics, after: ImageStatistics) -> str:
    changes = np.abs(np.array(after) / np.array(before) - 1)
    return NAMES[int(changes.argmax())]


def test_an_image_without_content_is_centred_and_not_an_error() -> None:
    black = compute(np.zeros((40, 30, 3), np.uint8))
    assert black == ImageStatistics(0.0, 0.0, 1.0, 1.0, 1.0, 0.5, 0.5)
