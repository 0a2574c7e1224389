import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy.ndimage import binary_erosion, zoom

from stpm.data.heatmaps import (
    FIRST_LEVEL,
    OVERLAY_COLOURS,
    jet_palette,
    mask_png,
    overlay,
    overlay_png,
    palette_png,
    read_shown,
    resize_map,
)
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


PAIRS = st.tuples(st.integers(1, 20), st.integers(1, 20)).flatmap(
    lambda shape: st.tuples(arrays(np.uint8, (*shape, 3)), arrays(np.uint8, shape))
)


@given(PAIRS)
def test_an_overlay_tints_what_is_found_and_surrounds_what_is_above_all_good_pixels(
    pair: tuple[np.ndarray, np.ndarray],
) -> None:
    pixels, levels = pair
    drawn, above = overlay(pixels, levels), levels > 128
    line = above & ~binary_erosion(above, np.ones((3, 3)), border_value=1)
    np.testing.assert_array_equal(drawn[levels < FIRST_LEVEL], pixels[levels < FIRST_LEVEL])
    assert (drawn[line] == 255).all()
    tinted = (levels >= FIRST_LEVEL) & ~line
    colours, opacity = jet_palette()[levels].astype(float), OVERLAY_COLOURS[levels, 3:] / 255
    expected = pixels * (1 - opacity) + colours * opacity
    np.testing.assert_allclose(drawn[tinted], expected[tinted], atol=0.51)
    # Pages lay a transparent PNG over the image instead.
    with Image.open(io.BytesIO(overlay_png(levels))) as layer:
        laid = Image.alpha_composite(Image.fromarray(pixels).convert("RGBA"), layer.convert("RGBA")).convert("RGB")
    np.testing.assert_allclose(np.asarray(laid, float), drawn.astype(float), atol=1)


def test_the_opacity_of_an_overlay_begins_where_it_can_be_seen_and_only_rises() -> None:
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    shown = [np.full((4, 4), level, np.uint8) for level in range(256)]
    opacity = np.array([255 - (overlay(white, each).astype(int) - overlay(black, each)).max() for each in shown])
    assert (opacity[:FIRST_LEVEL] == 0).all()
    assert opacity[FIRST_LEVEL] > 40
    assert (opacity[FIRST_LEVEL + 16 :] >= opacity[FIRST_LEVEL:-16]).all()
    assert opacity[255] < 200


def test_the_outline_of_a_mask_is_wider_in_a_large_picture() -> None:
    for side, width in ((200, 1), (700, 3)):
        mask = np.zeros((side, side), bool)
        mask[50:150, :100] = True
        with Image.open(io.BytesIO(mask_png(mask))) as image:
            colours = np.asarray(image.convert("RGBA"))
        # There is no line at the border of the image.
        inner = np.zeros_like(mask)
        inner[50 + width : 150 - width, : 100 - width] = True
        np.testing.assert_array_equal(colours, (mask & ~inner)[..., None] * np.uint8([0, 255, 255, 255]))


def test_a_rows_heatmap_is_scaled(rng: np.random.Generator, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels = rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(encode_image(pixels))
    row = {"uri": str(tmp_path / "a.png"), "archive_start": 0, "archive_length": -1, "heatmap": "", "heatmap_png": b""}
    for png, expected in ((b"", None), (palette_png(np.full((4, 4), 200, np.uint8)), np.full((8, 12), 200))):
        found = read_shown(row | {"heatmap_png": png}, "", make_preprocessing(64), 8, 12)
        assert found is not None
        np.testing.assert_array_equal(found[0], pixels)
        np.testing.assert_array_equal(found[1], expected)
    assert read_shown(row | {"heatmap": "gone.png"}, str(tmp_path), make_preprocessing(64), 8, 12) is None
    assert [record.message.split(": ")[0] for record in caplog.records] == [f"{row['uri']} is not shown"]


def test_a_map_is_enlarged_linearly(rng: np.random.Generator) -> None:
    small = rng.random((8, 8), np.float32)
    expected = zoom(small, 10, order=1, mode="nearest", grid_mode=True)
    assert resize_map(small, 80, 80) == pytest.approx(expected, abs=1e-5)
