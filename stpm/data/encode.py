"""Encode images as the bytes of files."""

from __future__ import annotations

import io

from PIL import Image


def encode_png(image: Image.Image, compress_level: int = 6) -> bytes:
    """Encode an image as PNG. zlib's level 1 takes a tenth of the time of 6, and files are a fifth larger."""
    sink = io.BytesIO()
    image.save(sink, "PNG", compress_level=compress_level)
    return sink.getvalue()


def encode_jpeg(image: Image.Image) -> bytes:
    """Encode an RGB image as JPEG, with the full resolution of its colours."""
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=90, subsampling=0)
    return sink.getvalue()
