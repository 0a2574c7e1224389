import dataclasses
import pickle
import struct
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stpm.data import decoding
from stpm.data.decoding import decode, decode_picture, read_size
from stpm.data.masks import crop_mask, decode_mask, resize_mask
from stpm.errors import FINAL_ERRORS, ImageError
from stpm.method.preprocessing import Resize
from tests.conftest import make_preprocessing
from tests.datasets import encode_image

GRADIENT = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (30, 1))
COLOURS = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)


def test_decode_keeps_pixels_at_model_size_and_repeats_grey_in_three_channels() -> None:
    pixels = COLOURS[:30, :30]
    np.testing.assert_array_equal(decode(encode_image(pixels), make_preprocessing(30)).pixels, pixels)
    # A crop is the middle.
    for picture, square in ((COLOURS, COLOURS[:, 5:35]), (COLOURS[:, :20], COLOURS[5:25, :20])):
        crop = make_preprocessing(len(square), resize="crop")
        np.testing.assert_array_equal(decode(encode_image(picture), crop).pixels, square)
    data = encode_image(GRADIENT)
    decoded = decode(data, make_preprocessing(30, 40))
    assert (decoded.width, decoded.height, decoded.bytes) == (40, 30, len(data))
    np.testing.assert_array_equal(decoded.pixels, np.repeat(GRADIENT[..., None], 3, axis=2))


def tiff_of_12_bits(values: np.ndarray) -> bytes:
    """Encode grey values of 12 bits, two in three bytes, as an uncompressed TIFF; an even number per row."""
    height, width = values.shape
    first, second = values.reshape(-1, 2).T.astype(int)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8).tobytes()
    # Tag and value: width, height, bits per sample, compression, photometry, offset of the strip, rows, its bytes.
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (278, height), (279, len(packed))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory


def test_decode_uses_the_range_of_12_bits_where_a_tiff_declares_them() -> None:
    values = np.random.default_rng(0).integers(0, 4096, (30, 30))
    pixels = decode(tiff_of_12_bits(values), make_preprocessing(30)).pixels
    np.testing.assert_array_equal(pixels, np.repeat(values[..., None] // 16, 3, axis=2))


@given(st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_decode_raises_only_image_errors(data: st.DataObject) -> None:
    original = bytearray(encode_image(COLOURS, data.draw(st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "WEBP"]))))
    for position in data.draw(st.lists(st.integers(0, min(len(original), 200) - 1), max_size=8)):
        original[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(original)))
    try:
        # A damaged header may claim a size that takes long to decode.
        with patch.object(decoding, "MAX_PIXELS", 1_000_000):
            assert decode(bytes(original[:cut]), make_preprocessing(32)).pixels.shape == (32, 32, 3)
    except ImageError as error:
        assert error.kind in FINAL_ERRORS
        sent = pickle.loads(pickle.dumps(error))
        assert (sent.kind, str(sent)) == (error.kind, str(error))


def test_decode_mask_keeps_size_and_resize_mask_uses_nearest_neighbour() -> None:
    mask = np.zeros((30, 40), np.uint8)
    mask[:, 20:] = 255
    read = decode_mask(encode_image(mask))
    np.testing.assert_array_equal(read, mask > 0)
    np.testing.assert_array_equal(resize_mask(read, make_preprocessing(10)), np.tile(np.arange(10) >= 5, (10, 1)))


RESIZES = st.sampled_from(["stretch", "crop", "fit"])
SIDES = st.integers(1, 500)


@given(RESIZES, SIDES, SIDES, st.integers(32, 90), st.integers(32, 90), st.floats(0, 1), st.floats(0, 1))
def test_to_original_finds_a_planted_spot(
    resize: Resize, width: int, height: int, rows: int, columns: int, across: float, down: float
) -> None:
    """The brightest pixel of the decoded image maps back to the spot, up to the blur of resizing."""
    made = make_preprocessing(rows, columns, resize)
    left, top, right, bottom = made.source_box(width, height)
    x = min(int(left + across * (right - left)), width - 1)
    y = min(int(top + down * (bottom - top)), height - 1)
    pixels = np.zeros((height, width, 3), np.uint8)
    # The spot spans a few pixels of the input, so that downsizing does not remove it.
    reach_x, reach_y = (int(2 * side / size) + 1 for side, size in ((width, columns), (height, rows)))
    yy, xx = np.mgrid[:height, :width]
    fall = np.maximum(np.abs(xx - x) / (3 * reach_x), np.abs(yy - y) / (3 * reach_y))
    pixels[:] = (255 * (1 - fall)).clip(0, 255).astype(np.uint8)[..., None]
    box = made.content_box(width, height)
    content = decode(encode_image(pixels), made).pixels[box[1] : box[3], box[0] : box[2], 0]
    peak = np.argwhere(content == content.max()).mean(axis=0).round().astype(int)
    found_x, found_y = made.to_original(int(peak[1]), int(peak[0]), width, height)
    scale_x = (right - left) / content.shape[1]
    scale_y = (bottom - top) / content.shape[0]
    assert abs(found_x - x) <= 2 * max(scale_x, 1) + 1
    assert abs(found_y - y) <= 2 * max(scale_y, 1) + 1


@given(RESIZES, SIDES, SIDES, st.integers(32, 90), st.integers(32, 90))
def test_resize_mask_has_shape_of_map(resize: Resize, width: int, height: int, rows: int, columns: int) -> None:
    made = make_preprocessing(rows, columns, resize)
    for value in (False, True):
        mask = np.full((height, width), value)
        resized = resize_mask(mask, made)
        assert resized.shape == made.content_shape(width, height)
        assert (resized == value).all()
        assert crop_mask(mask, made).size > 0


def test_decode_fit_pads_with_mean() -> None:
    made = make_preprocessing(64, resize="fit")
    decoded = decode(encode_image(np.full((50, 200, 3), 250, np.uint8)), made)
    assert decoded.pixels.shape == (64, 64, 3)
    assert (decoded.pixels[24:40] == 250).all()
    assert (np.delete(decoded.pixels, slice(24, 40), axis=0) == made.padding_colour).all()


def test_decode_uses_given_interpolation() -> None:
    for name, resampling in (("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)):
        made = dataclasses.replace(make_preprocessing(24, 16), interpolation=name)  # type: ignore[arg-type]
        expected = np.asarray(Image.fromarray(COLOURS).resize((16, 24), resampling))
        np.testing.assert_array_equal(decode(encode_image(COLOURS), made).pixels, expected)


@pytest.mark.parametrize("resize", ["stretch", "crop"])
def test_a_picture_of_a_large_jpeg_is_that_of_all_its_pixels(resize: Resize) -> None:
    y, x = np.mgrid[0:1201, 0:1803]
    smooth = np.stack([x / 1803, y / 1201, (x + y) / 3004], axis=2) * 255
    preprocessing = make_preprocessing(64, resize=resize)
    picture, whole = (
        decode_picture(encode_image(smooth.astype(np.uint8), kind), preprocessing, 90, 300).astype(int)
        for kind in ("JPEG", "PNG")
    )
    assert picture.shape == whole.shape
    assert np.abs(picture - whole).max() <= 4


def test_decode_picture_keeps_proportions() -> None:
    picture = decode_picture(encode_image(COLOURS), make_preprocessing(64), 15, 1000)
    expected = Image.fromarray(COLOURS).resize((20, 15), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(picture, np.asarray(expected))


def test_read_size_needs_only_the_header() -> None:
    assert read_size(encode_image(COLOURS)) == (40, 30)
    # A file cut off after its header is enough.
    assert read_size(encode_image(COLOURS)[:100]) == (40, 30)
    with pytest.raises(ImageError):
        read_size(b"")
