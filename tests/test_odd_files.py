"""Decode files as cameras, editors, converters and broken transfers write them."""

from __future__ import annotations

import ast
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image, ImageCms

from stpm.data.decoding import decode
from stpm.errors import ImageError
from tests.conftest import REPOSITORY, make_preprocessing

PREPROCESSING = make_preprocessing(32)
GREY = np.tile(np.linspace(0, 255, 48).astype(np.uint8), (36, 1))
COLOUR = np.stack([GREY, GREY[:, ::-1], np.full_like(GREY, 60)], axis=-1)
SCORED = "scored"


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def rgb(kind: str, **options: Any) -> bytes:
    return saved(Image.fromarray(COLOUR), kind, **options)


def as_mode(mode: str, kind: str, **options: Any) -> bytes:
    return saved(Image.fromarray(COLOUR).convert(mode), kind, **options)


def deep(kind: str, dtype: str = "<u2") -> bytes:
    return saved(Image.fromarray((GREY.astype(np.uint16) * 257).astype(dtype)), kind)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return rgb("JPEG", exif=exif)


def pages(kind: str) -> bytes:
    frames = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


def png_with_size(width: int, height: int) -> bytes:
    data = bytearray(rgb("PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def png_chunk(name: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    data = rgb("PNG")
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return data[:33] + chunk + data[33:]


def cut(data: bytes, tenths: int) -> bytes:
    return data[: len(data) * tenths // 10]


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
BASELINE = {"PNG": rgb("PNG"), "JPEG": rgb("JPEG"), "BMP": rgb("BMP"), "TIFF": rgb("TIFF"), "WEBP": rgb("WEBP")}

# Noise does not compress: where such a file ends early, pixels are missing.
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (36, 48, 3), dtype=np.uint8))

# The bytes of each file, and the outcomes that are right: SCORED or kinds of error.
CORPUS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "one zero byte": (b"\0", "not_an_image"),
    "text named .png": (b"The quick brown fox jumps over the lazy dog." * 20, "not_an_image"),
    "a web page instead of an image": (b"<!doctype html><title>503 Slow Down</title>", "not_an_image"),
    "an S3 error document": (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', "not_an_image"),
    "a zip": (b"PK\x03\x04" + bytes(200), "not_an_image"),
    "zeros as long as an image": (bytes(len(BASELINE["PNG"])), "not_an_image"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not_an_image"),
    "signature of a PNG and no more": (BASELINE["PNG"][:8], "not_an_image damaged"),
    "signature of a JPEG and no more": (b"\xff\xd8\xff", "not_an_image damaged"),
    "PNG header of 40,000 × 40,000": (png_with_size(40_000, 40_000), "too_large"),
    "PNG header of no width": (png_with_size(0, 36), "damaged not_an_image"),
    "PNG header of the largest size there is": (png_with_size(2**31 - 1, 2**31 - 1), "too_large"),
    "PNG with fewer pixels than in its header": (png_with_size(480, 360), "damaged"),
    "PNG with an unknown chunk": (png_chunk(b"prVt", b"x" * 50), SCORED),
    "PNG with a comment of no encoding": (png_chunk(b"tEXt", b"Comment\0\xff\xfe\x80"), SCORED),
    "PNG with a wrong checksum of its pixels": (flipped(BASELINE["PNG"], len(BASELINE["PNG"]) - 14), "damaged scored"),
    "PNG with bytes after its end": (BASELINE["PNG"] + b"trailing" * 30, SCORED),
    "PNG, 1 bit": (as_mode("1", "PNG"), SCORED),
    "PNG, grey": (as_mode("L", "PNG"), SCORED),
    "PNG, grey with alpha": (as_mode("LA", "PNG"), SCORED),
    "PNG, palette": (as_mode("P", "PNG"), SCORED),
    "PNG, palette of 4 with transparency": (
        saved(Image.fromarray(COLOUR).quantize(4), "PNG", transparency=0, bits=2),
        SCORED,
    ),
    "PNG, alpha": (as_mode("RGBA", "PNG"), SCORED),
    "PNG, 16-bit grey": (deep("PNG"), SCORED),
    "PNG, interlaced size of one pixel": (saved(Image.new("RGB", (1, 1), "red"), "PNG"), SCORED),
    "PNG, one row": (saved(Image.fromarray(COLOUR[:1]), "PNG"), SCORED),
    "PNG, one column": (saved(Image.fromarray(COLOUR[:, :1]), "PNG"), SCORED),
    "PNG, 3,000 × 1": (saved(Image.new("RGB", (3000, 1), "red"), "PNG"), SCORED),
    "PNG with a profile": (rgb("PNG", icc_profile=PROFILE), SCORED),
    "PNG with a broken profile": (rgb("PNG", icc_profile=b"no profile"), SCORED),
    "animated PNG": (pages("PNG"), SCORED),
    "JPEG, grey": (as_mode("L", "JPEG"), SCORED),
    "JPEG, CMYK": (as_mode("CMYK", "JPEG"), SCORED),
    "JPEG, progressive": (rgb("JPEG", progressive=True), SCORED),
    "JPEG, of the worst quality": (rgb("JPEG", quality=1), SCORED),
    "JPEG, without subsampling": (rgb("JPEG", subsampling=0), SCORED),
    "JPEG with a profile": (rgb("JPEG", icc_profile=PROFILE), SCORED),
    "JPEG with a comment": (rgb("JPEG", comment=b"\xff\xfe\x00"), SCORED),
    "JPEG with an orientation that does not exist": (turned(99), SCORED),
    "JPEG with bytes after its end": (BASELINE["JPEG"] + bytes(100), SCORED),
    "JPEG without its first byte": (BASELINE["JPEG"][1:], "not_an_image"),
    "two JPEGs in one": (BASELINE["JPEG"] * 2, SCORED),
    "BMP, grey": (as_mode("L", "BMP"), SCORED),
    "BMP, 1 bit": (as_mode("1", "BMP"), SCORED),
    "TIFF, grey": (as_mode("L", "TIFF"), SCORED),
    "TIFF, 16-bit grey": (deep("TIFF"), SCORED),
    "TIFF, 16-bit grey, most significant byte first": (deep("TIFF", ">u2"), SCORED),
    "TIFF, CMYK": (as_mode("CMYK", "TIFF"), SCORED),
    "TIFF, deflate": (rgb("TIFF", compression="tiff_adobe_deflate"), SCORED),
    "TIFF, LZW": (rgb("TIFF", compression="tiff_lzw"), SCORED),
    "TIFF, fax": (as_mode("1", "TIFF", compression="group4"), SCORED),
    "TIFF of two pages": (pages("TIFF"), SCORED),
    "TIFF, 32-bit float": (saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "unsupported"),
    "TIFF, 32-bit integer": (saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "unsupported"),
    "WebP, lossless": (rgb("WEBP", lossless=True), SCORED),
    "WebP with alpha": (as_mode("RGBA", "WEBP"), SCORED),
    "animated WebP": (pages("WEBP"), SCORED),
    # Pillow would open these; for EPS it would start an interpreter.
    "EPS": (rgb("EPS"), "not_an_image"),
    "GIF": (as_mode("P", "GIF"), "not_an_image"),
    "portable pixmap": (rgb("PPM"), "not_an_image"),
    **{f"JPEG, orientation {n}": (turned(n), SCORED) for n in range(1, 9)},
    **{
        f"{kind} cut at {tenths}0 %": (cut(saved(NOISE, kind), tenths), "damaged not_an_image")
        for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
        for tenths in range(1, 10)
    },
}


@pytest.mark.parametrize("name", CORPUS)
def test_each_file_is_decoded_or_has_the_right_kind_of_error(name: str) -> None:
    data, expected = CORPUS[name]
    try:
        found = decode(data, PREPROCESSING)
    except ImageError as error:
        assert error.kind in expected.split(), error
        assert str(error)
    else:
        assert SCORED in expected.split()
        assert (found.pixels.shape, found.pixels.dtype, found.bytes) == ((32, 32, 3), np.uint8, len(data))


def test_every_image_open_names_its_formats() -> None:
    calls = [
        (path, call)
        for folder in ("stpm", "bench", "jobs")
        for path in (REPOSITORY / folder).rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "Image.open"
    ]
    assert len(calls) >= 4
    for path, call in calls:
        assert "formats" in [keyword.arg for keyword in call.keywords], (path, call.lineno)


@pytest.mark.parametrize(("raised", "kind"), [(RecursionError("deep"), "unforeseen"), (MemoryError(), "out_of_memory")])
def test_an_error_of_pillow_becomes_an_image_error(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: str
) -> None:
    monkeypatch.setattr(Image.Image, "resize", Mock(side_effect=raised))
    with pytest.raises(ImageError) as caught:
        decode(rgb("PNG"), PREPROCESSING)
    assert caught.value.kind == kind


def pixels(data: bytes) -> np.ndarray:
    return decode(data, PREPROCESSING).pixels.astype(int)


@pytest.mark.parametrize(
    "same",
    [
        lambda: (rgb("PNG"), png_chunk(b"prVt", b"x")),
        lambda: (rgb("PNG"), rgb("BMP")),
        lambda: (rgb("PNG"), rgb("TIFF")),
        lambda: (rgb("PNG"), rgb("WEBP", lossless=True)),
        lambda: (rgb("PNG"), as_mode("RGBA", "PNG")),
        lambda: (rgb("PNG"), pages("TIFF")),
        lambda: (rgb("PNG"), as_mode("CMYK", "TIFF")),
        lambda: (as_mode("L", "PNG"), as_mode("L", "TIFF")),
        lambda: (as_mode("L", "PNG"), as_mode("LA", "PNG")),
        lambda: (saved(Image.fromarray(GREY), "PNG"), saved(Image.fromarray(GREY).convert("P"), "PNG")),
        lambda: (as_mode("1", "PNG"), saved(Image.fromarray(COLOUR).convert("1").convert("L"), "PNG")),
        # Orientation is not applied: masks and peak coordinates mean the pixels as stored.
        lambda: (rgb("JPEG"), turned(6)),
        lambda: (saved(Image.fromarray(GREY), "PNG"), deep("PNG")),
        lambda: (deep("PNG"), deep("TIFF", ">u2")),
    ],
)
def test_the_file_format_does_not_change_the_pixels(same: Callable[[], tuple[bytes, bytes]]) -> None:
    one, other = same()
    assert np.abs(pixels(one) - pixels(other)).max() <= 1
