"""Decode files as cameras, editors, converters and broken transfers write them."""

import ast
import io
import struct
import zlib
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
LUMINANCE = np.asarray(Image.fromarray(COLOUR).convert("L"))


def encode(picture: np.ndarray | Image.Image, kind: str, mode: str = "", **options: Any) -> bytes:
    sink = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    (image.convert(mode) if mode else image).save(sink, kind, **options)
    return sink.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(COLOUR, "JPEG", exif=exif)


def pages(kind: str) -> bytes:
    return encode(COLOUR, kind, save_all=True, append_images=[Image.fromarray(255 - COLOUR)])


def png_with_size(width: int, height: int) -> bytes:
    data = bytearray(encode(COLOUR, "PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def png_chunk(name: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    data = encode(COLOUR, "PNG")
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return data[:33] + chunk + data[33:]


DEEP = GREY.astype(np.uint16) * 257
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PNG, JPEG = encode(COLOUR, "PNG"), encode(COLOUR, "JPEG")
# Noise does not compress: where such a file ends early, pixels are missing.
NOISE = np.random.default_rng(0).integers(0, 255, (36, 48, 3), dtype=np.uint8)
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "PNG": [{"icc_profile": PROFILE}, {"icc_profile": b"no profile"}, {"mode": "RGBA"}],
    "JPEG": [{"progressive": True}, {"subsampling": 0}, {"icc_profile": PROFILE}, {"comment": b"\xff\xfe\x00"}],
    "BMP": [{}],
    "TIFF": [{}, {"compression": "tiff_adobe_deflate"}, {"compression": "tiff_lzw"}, {"mode": "CMYK"}],
    "WEBP": [{"lossless": True}, {"mode": "RGBA"}],
}

# The bytes of each file, and the picture that it shows, or the kinds of error that are right.
CORPUS: dict[str, tuple[bytes, np.ndarray | str]] = {
    "empty": (b"", "empty"),
    "one zero byte": (b"\0", "not_an_image"),
    "text named .png": (b"The quick brown fox jumps over the lazy dog." * 20, "not_an_image"),
    "an S3 error document": (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', "not_an_image"),
    "a zip": (b"PK\x03\x04" + bytes(200), "not_an_image"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not_an_image"),
    "signature of a PNG and no more": (PNG[:8], "not_an_image damaged"),
    "signature of a JPEG and no more": (b"\xff\xd8\xff", "not_an_image damaged"),
    "PNG header of 40,000 × 40,000": (png_with_size(40_000, 40_000), "too_large"),
    "PNG header of no width": (png_with_size(0, 36), "damaged not_an_image"),
    "PNG header of the largest size there is": (png_with_size(2**31 - 1, 2**31 - 1), "too_large"),
    "PNG with fewer pixels than in its header": (png_with_size(480, 360), "damaged"),
    "PNG with an unknown chunk": (png_chunk(b"prVt", b"x" * 50), COLOUR),
    "PNG with a comment of no encoding": (png_chunk(b"tEXt", b"Comment\0\xff\xfe\x80"), COLOUR),
    "PNG with bytes after its end": (PNG + b"trailing" * 30, COLOUR),
    "PNG, 1 bit": (encode(COLOUR, "PNG", "1"), np.asarray(Image.fromarray(COLOUR).convert("1").convert("L"))),
    "PNG, palette": (encode(GREY, "PNG", "P"), GREY),
    "PNG, palette of 4 with transparency": (
        encode(Image.fromarray(GREY // 64 * 85).quantize(4), "PNG", transparency=0, bits=2),
        GREY // 64 * 85,
    ),
    "PNG, interlaced size of one pixel": (encode(COLOUR[:1, :1], "PNG"), COLOUR[:1, :1]),
    "PNG, one row": (encode(COLOUR[:1], "PNG"), COLOUR[:1]),
    "PNG, 1 × 3,000": (encode(np.tile(COLOUR[:1, :1], (3000, 1, 1)), "PNG"), COLOUR[:1, :1]),
    "JPEG with an orientation that does not exist": (turned(99), COLOUR),
    "JPEG with bytes after its end": (JPEG + bytes(100), COLOUR),
    "JPEG without its first byte": (JPEG[1:], "not_an_image"),
    "two JPEGs in one": (JPEG * 2, COLOUR),
    "JPEG, CMYK": (encode(COLOUR, "JPEG", "CMYK"), COLOUR),
    "TIFF, fax": (encode(np.tile(GREY // 128 * 255, (2, 1)), "TIFF", "1", compression="group4"), GREY // 128 * 255),
    "TIFF, 32-bit float": (encode(GREY.astype(np.float32), "TIFF"), "unsupported"),
    "TIFF, 32-bit integer": (encode(GREY.astype(np.int32), "TIFF"), "unsupported"),
    # Pillow would open these; for EPS it would start an interpreter.
    "EPS": (encode(COLOUR, "EPS"), "not_an_image"),
    "GIF": (encode(COLOUR, "GIF", "P"), "not_an_image"),
    "portable pixmap": (encode(COLOUR, "PPM"), "not_an_image"),
    **{f"16-bit {kind}": (encode(DEEP, kind), GREY) for kind in ("PNG", "TIFF")},
    "16-bit TIFF, most significant byte first": (encode(DEEP.astype(">u2"), "TIFF"), GREY),
    **{f"{kind}, grey": (encode(COLOUR, kind, "L"), LUMINANCE) for kind in ("PNG", "JPEG", "BMP", "TIFF")},
    "PNG, grey with alpha": (encode(COLOUR, "PNG", "LA"), LUMINANCE),
    # It is not applied: masks and peak coordinates mean the pixels as stored.
    **{f"JPEG, orientation {n}": (turned(n), COLOUR) for n in range(1, 9)},
    **{f"{kind} of two pages": (pages(kind), COLOUR) for kind in ("PNG", "TIFF", "WEBP")},
    **{f"{kind} with {str(o)[:40]}": (encode(COLOUR, kind, **o), COLOUR) for kind in OPTIONS for o in OPTIONS[kind]},
    **{
        f"{kind} cut at {tenths}0 %": (data[: len(data) * tenths // 10], "damaged not_an_image")
        for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
        for data in [encode(NOISE, kind)]
        for tenths in range(1, 10)
    },
}


@pytest.mark.parametrize("name", CORPUS)
def test_each_file_shows_its_picture_or_has_the_right_kind_of_error(name: str) -> None:
    data, expected = CORPUS[name]
    if isinstance(expected, str):
        with pytest.raises(ImageError, match=r".") as caught:
            decode(data, PREPROCESSING)
        assert caught.value.kind in expected.split(), caught.value
    else:
        found, same = decode(data, PREPROCESSING), decode(encode(expected, "PNG"), PREPROCESSING)
        assert (found.pixels.shape, found.pixels.dtype, found.bytes) == ((32, 32, 3), np.uint8, len(data))
        difference = np.abs(found.pixels.astype(int) - same.pixels)
        # JPEG and WebP lose a little.
        assert difference.mean() < 3 if data[:2] in (b"\xff\xd8", b"RI") else difference.max() <= 1


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
def test_an_error_of_pillow_is_an_image_error(monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: str) -> None:
    monkeypatch.setattr(Image.Image, "resize", Mock(side_effect=raised))
    with pytest.raises(ImageError) as caught:
        decode(PNG, PREPROCESSING)
    assert caught.value.kind == kind
