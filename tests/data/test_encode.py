from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from stpm.data.encode import encode_jpeg, encode_png

COLOURS = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)


@pytest.mark.parametrize("compress_level", [0, 1, 9])
def test_encode_png_is_lossless(compress_level: int) -> None:
    with Image.open(io.BytesIO(encode_png(Image.fromarray(COLOURS), compress_level)), formats=["PNG"]) as image:
        np.testing.assert_array_equal(np.asarray(image), COLOURS)


def test_encode_jpeg_keeps_size() -> None:
    with Image.open(io.BytesIO(encode_jpeg(Image.fromarray(COLOURS))), formats=["JPEG"]) as image:
        assert image.size == (40, 30)
