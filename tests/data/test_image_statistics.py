import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from stpm.data.image_statistics import ImageStatistics, compute_statistics


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
    pixels = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8) // np.array([1, 2, 4], np.uint8)
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


def test_content_is_found_where_it_is_and_moves_by_what_the_camera_moved() -> None:
    middle, moved = compute(grey_square(128, 100)), compute(grey_square(141, 100))
    assert (middle.position_x, middle.position_y) == pytest.approx((0.5, 100 / 256), abs=0.01)
    assert moved.position_x - middle.position_x == pytest.approx(13 / 256, abs=0.004)
    assert moved.position_y == pytest.approx(middle.position_y)
    # Without any, it is in the middle.
    black = compute(np.zeros((40, 30, 3), np.uint8))
    assert black == ImageStatistics(0.0, 0.0, 1.0, 1.0, 1.0, 0.5, 0.5)
