from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import zoom

from stpm.data.heatmaps import jet_palette, overlay, palette_png, read_overlay, resize_map
from tests.conftest import make_preprocessing
from tests.datasets import encode_image


def test_palette_runs_from_blue_over_green_to_red() -> None:
    palette = jet_palette().astype(int)
    assert palette[0].tolist() == [0, 0, 128]
    assert palette[255].tolist() == [128, 0, 0]
    assert palette[127, 1] == 255
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    with Image.open(io.BytesIO(palette_png(levels))) as image:
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), jet_palette()[levels])


def test_overlay_is_half_image_and_half_heatmap(rng: np.random.Generator) -> None:
    pixels, levels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), rng.integers(0, 256, (4, 4), dtype=np.uint8)
    expected = (pixels.astype(float) + jet_palette()[levels]) / 2
    np.testing.assert_allclose(overlay(pixels, levels), expected, atol=0.5)


def test_the_heatmap_of_a_row_is_scaled_to_its_image(rng: np.random.Generator, tmp_path: Path) -> None:
    pixels = rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(encode_image(pixels))
    row = {"uri": str(tmp_path / "a.png"), "archive_start": 0, "archive_length": -1, "heatmap": "", "heatmap_png": b""}
    picture, overlaid = read_overlay(row, "", make_preprocessing(64), 8, 12)
    np.testing.assert_array_equal(picture, pixels)
    assert overlaid is None
    row["heatmap_png"] = palette_png(np.full((4, 4), 200, np.uint8))
    _, overlaid = read_overlay(row, "", make_preprocessing(64), 8, 12)
    assert overlaid is not None
    np.testing.assert_array_equal(overlaid, overlay(pixels, np.full((8, 12), 200, np.uint8)))


def test_a_map_is_enlarged_linearly(rng: np.random.Generator) -> None:
    small = rng.random((8, 8), np.float32)
    expected = zoom(small, 10, order=1, mode="nearest", grid_mode=True)
    assert resize_map(small, 80, 80) == pytest.approx(expected, abs=1e-5)
