"""Decode image files to uint8 RGB pixels at model size. Fitting and scoring share this code.

Conventions: EXIF orientation is not applied, since masks and peak coordinates refer to the pixels as stored. 16-bit
grey is divided by 257, and 12-bit grey of TIFF by 16, independent of the image's own range, so that images of one
camera are comparable. An alpha channel is dropped. The first frame of an animation or a multi-page file is decoded.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from stpm.data.image_statistics import ImageStatistics, compute_statistics
from stpm.errors import ImageError, one_line
from stpm.method.preprocessing import Preprocessing
from stpm.method.roi import Roi

Pixels = npt.NDArray[np.uint8]
# The bytes of an image file; or an image of any mode that a file can have.
Fetched = bytes | Image.Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
# Formats are read from a file's contents, not its name. Pillow knows more, and starts other programs for some of them.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
MAX_PIXELS = 100_000_000
# Largest file: four bytes for each pixel, uncompressed, and its header.
MAX_BYTES = 4 * MAX_PIXELS + 2**20
# Largest memory that decoding one image takes: Pillow's image before and after its conversion.
DECODING_BYTES = 8 * MAX_PIXELS

# How much of white what is not inspected has in pictures for people.
_PALE = 0.7
# How far the inside of a region of interest is continued, pixels at model size, and the weight of what it fades to.
_SOFT, _FADED = ImageFilter.BoxBlur(16), 0.1

_BITS_PER_SAMPLE = 258  # TIFF's tag
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Decoded:
    """A decoded image.

    Args:
        pixels: (H, W, 3) uint8 RGB at model size, padding included.
        width: of the image itself, pixels, as are its height and statistics.
        bytes: size of the file; 0 if there is none.
        mode: Pillow's name of the kind of pixels that the image had: RGB, L (grey), I;16, RGBA and others.
        inspected: the pixels at model size that are inspected, as `stpm.method.preprocessing.Content` has them.
    """

    pixels: Pixels
    width: int
    height: int
    inspected: bytes
    bytes: int
    statistics: ImageStatistics
    mode: str


@contextmanager
def _decoding_errors() -> Iterator[None]:
    """Turn every exception into an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("out_of_memory", "not enough memory to decode it") from error
    except Exception as error:
        raise ImageError("unforeseen", one_line(error)) from error


@_decoding_errors()
def decode(fetched: Fetched, preprocessing: Preprocessing, roi: Roi | None = None) -> Decoded:
    """Cut out the part of an image that the model sees, and resize it to the model's input, with antialiasing.

    Nothing of the result depends on pixels outside of the image's own region of interest `roi`, or else of that of the
    preprocessing.

    Raises:
        ImageError: if it cannot be decoded, its pixels have no fixed range, or the region is of another size; nothing
            else is raised.
    """
    image = _open(fetched)
    width, height = image.size
    rgb = _as_rgb(image)
    roi = roi or preprocessing.roi
    if roi:
        if (roi.width, roi.height) != image.size:
            raise ImageError(
                "other_size",
                f"the image is {width}×{height}, its region of interest {roi.width}×{roi.height}; give one of its size",
            )
        region = _region(roi, preprocessing)
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, preprocessing.padding_colour), region.mask)
    statistics = compute_statistics(rgb)
    content = preprocessing.content_shape(width, height)
    if rgb.size != content[::-1]:
        resampling = _RESAMPLING[preprocessing.interpolation]
        rgb = rgb.resize(content[::-1], resampling, box=preprocessing.source_box(width, height))
    if roi:
        rgb = _soften(rgb, region, preprocessing.padding_colour)
    if content != preprocessing.input_shape:
        padded = Image.new("RGB", (preprocessing.width, preprocessing.height), preprocessing.padding_colour)
        padded.paste(rgb, preprocessing.content_box(width, height))
        rgb = padded
    file_bytes = len(fetched) if isinstance(fetched, bytes) else 0
    inspected = region.inspected if roi else b""
    return Decoded(np.asarray(rgb), width, height, inspected, file_bytes, statistics, image.mode)


class _Region(NamedTuple):
    """A region of interest, of an image's own pixels, and of those that the model sees.

    Args:
        blurred: how much of what surrounds each pixel is inside, (H, W, 1) float32, 0 to 1.
        inspected: see `Content`.
    """

    mask: Image.Image
    inside: Image.Image
    blurred: npt.NDArray[np.float32]
    inspected: bytes


# Most images of a category have the same one.
@lru_cache(maxsize=8)
def _region(roi: Roi, preprocessing: Preprocessing) -> _Region:
    mask = Image.fromarray(roi.mask)
    box = preprocessing.source_box(roi.width, roi.height)
    rows, columns = preprocessing.content_shape(roi.width, roi.height)
    covered = np.asarray(mask.convert("F").resize((columns, rows), Image.Resampling.BOX, box=box))
    if not covered.any():
        raise ImageError("other_size", f"its region of interest is outside of what the model sees, {box} pixels")
    # A region that is narrower than a pixel has pixels, too.
    inside = covered >= min(covered.max(), 0.5 * 255)
    left, top, right, bottom = preprocessing.content_box(roi.width, roi.height)
    whole = np.zeros(preprocessing.input_shape, bool)
    whole[top:bottom, left:right] = inside
    shown = Image.fromarray(inside).convert("L")
    blurred = np.asarray(shown.filter(_SOFT), np.float32)[:, :, None] / np.float32(255)
    return _Region(mask.convert("L"), shown, blurred, np.packbits(whole).tobytes())


def _soften(rgb: Image.Image, region: _Region, colour: tuple[int, int, int]) -> Image.Image:
    """Continue the inside of a region by what is near, which fades to a colour: its border would be an edge."""
    near = Image.composite(rgb, Image.new("RGB", rgb.size), region.inside).filter(_SOFT)
    continued = (np.asarray(near) + _FADED * np.array(colour, np.float32)) / (region.blurred + _FADED)
    return Image.composite(rgb, Image.fromarray(continued.round().clip(0, 255).astype(np.uint8)), region.inside)


@_decoding_errors()
def decode_picture(
    data: bytes, preprocessing: Preprocessing, shorter: int, longest: int, roi: Roi | None = None
) -> Pixels:
    """Decode the part of an image that the model sees, in the image's own proportions: (H, W, 3) uint8 RGB.

    Its shorter side has `shorter` pixels, or fewer where the longer side would exceed `longest`. What is outside of the
    image's own region of interest `roi`, or else of that of the preprocessing, is paler. Raises ImageError.
    """
    image = _open_header(data)
    size = preprocessing.picture_size(*image.size, shorter, longest)
    box = np.reshape(preprocessing.source_box(*image.size), (2, 2))
    # A JPEG need not be decoded whole: a half, a quarter or an eighth of it is enough that has twice the wanted pixels.
    whole = np.array(image.size)
    image.draft(None, tuple(np.ceil(2 * np.array(size) * whole / (box[1] - box[0])).astype(int)))
    box = np.minimum(box * image.size / whole, image.size)
    picture = _as_rgb(_load(image)).resize(size, Image.Resampling.BILINEAR, box=tuple(box.ravel()))
    if (roi := roi or preprocessing.roi) and (roi.width, roi.height) == tuple(whole.tolist()):
        seen = preprocessing.source_box(roi.width, roi.height)
        inside = Image.fromarray(roi.mask).convert("L").resize(size, Image.Resampling.BILINEAR, box=seen)
        picture = Image.composite(picture, Image.blend(picture, Image.new("RGB", size, "white"), _PALE), inside)
    return np.asarray(picture)


@_decoding_errors()
def open_rgb(fetched: Fetched) -> Image.Image:
    """Decode an image at its own size. Raises ImageError."""
    return _as_rgb(_open(fetched))


@_decoding_errors()
def open_grey(data: bytes) -> Image.Image:
    """Decode a file to one channel, of 16 or 32 bits if the file has them, at its own size.

    Raises:
        ImageError: if it cannot be decoded, or a part of it is transparent, which is neither black nor white.
    """
    image = _open(data)
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise ImageError("unsupported", "a part is transparent; save it in black and white, without transparency")
    return image if image.mode in ("L", "1") or image.mode.startswith("I") else image.convert("L")


@_decoding_errors()
def read_size(fetched: Fetched) -> tuple[int, int]:
    """Read width and height; of a file, from its header alone. Raises ImageError."""
    return _open_header(fetched).size if isinstance(fetched, bytes) else fetched.size


def _open_header(data: bytes) -> Image.Image:
    if not data:
        raise ImageError("empty", "the file has no bytes")
    # This is process-wide: Pillow's own limit would warn of images that are allowed here. The size in the header is
    # checked below, before anything is allocated.
    Image.MAX_IMAGE_PIXELS = None
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(
            "not_an_image",
            f"{len(data)} bytes whose beginning is not that of {', '.join(FORMATS[:-1])} or {FORMATS[-1]}",
        ) from error
    except Exception as error:
        raise ImageError("damaged", f"broken header: {error}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError("too_large", f"{width}×{height} pixels, at most {MAX_PIXELS:,} are allowed")
    return image


def _open(fetched: Fetched) -> Image.Image:
    return _load(_open_header(fetched) if isinstance(fetched, bytes) else fetched)


def _load(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        width, height = image.size
        raise ImageError("damaged", f"{image.format} of {width}×{height}: {error}") from error
    return image


def _as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8 bits per colour, see the module's conventions."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, and almost all of the image would be white. Only TIFF has other depths.
        bits = image.tag_v2[_BITS_PER_SAMPLE][0] if isinstance(image, TiffImageFile) else 16
        divisor = np.uint16(16 if bits == 12 else 257)
        return Image.fromarray((np.asarray(image) // divisor).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(
            "unsupported", f"{image.format} with 32 bits per pixel has no fixed range; save it with 8 or 16"
        )
    try:
        return image.convert("RGB")
    except Exception as error:
        raise ImageError("unsupported", f"{image.format} in mode {image.mode}: {error}") from error
