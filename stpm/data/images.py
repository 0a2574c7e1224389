"""From the bytes of an image file to uint8 RGB pixels at model size. Fitting and scoring share it.

Conventions: EXIF orientation is not applied, since masks and peak coordinates refer to the pixels as stored.
16-bit grey is divided by 257, the full range of its type, so that two images of one camera compare.
An alpha channel is dropped. Of an animation or a multi-page file the first frame is taken.

Errors about the image are final. Those about storage, a model or a device are transient: the image may be scored once
these work again.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from stpm.errors import ImageError
from stpm.method.preprocessing import Preprocessing

Pixels = npt.NDArray[np.uint8]

FINAL_ERRORS = (
    "not_allowed",
    "bad_name",
    "missing",
    "empty",
    "not_an_image",
    "damaged",
    "too_large",
    "too_slow",
    "unsupported",
    "unforeseen",
    "no_model",
)
TRANSIENT_ERRORS = (
    "unreadable",
    "timeout",
    "out_of_memory",
    "model_unreadable",
    "model_damaged",
    "forward_failed",
)
ERROR_KINDS = (*FINAL_ERRORS, *TRANSIENT_ERRORS)
# Of many images in a row they say that something else is broken. Storage that is not mounted looks like missing files.
EXTERNAL_ERRORS = frozenset((*TRANSIENT_ERRORS, "missing"))
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
# Pillow can open far more, by programs that it starts for some: what a file is named says nothing.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
MAX_PIXELS = 100_000_000
# Of a file: four bytes for each pixel, uncompressed, and what comes before and after them.
MAX_BYTES = 4 * MAX_PIXELS + 2**20
# What one image takes while it is decoded, at most: as Pillow holds it, before and after it is converted.
DECODING_BYTES = 8 * MAX_PIXELS

# Every file is checked against max_pixels from its header, before anything is allocated.
Image.MAX_IMAGE_PIXELS = None


_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Decoded:
    """Pixels at model size, padding included: (H, W, 3) uint8 RGB; width, height and size in bytes are the file's."""

    pixels: Pixels
    width: int
    height: int
    bytes: int


@contextmanager
def _decoding_errors() -> Iterator[None]:
    """Raise whatever goes wrong while an image is decoded as an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("out_of_memory", "no memory to decode it in") from error
    except Exception as error:
        raise ImageError("unforeseen", f"{type(error).__name__}: {error}") from error


@_decoding_errors()
def decode(data: bytes, preprocessing: Preprocessing, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decode an image and bring what the model sees of it to the size of its input, with antialiasing.

    Raises:
        ImageError: whatever the bytes hold, nothing else is raised.
    """
    image = _open(data, max_pixels)
    width, height = image.size
    rgb = _as_rgb(image)
    content = preprocessing.content_shape(width, height)
    if rgb.size != content[::-1]:
        resampling = _RESAMPLING[preprocessing.interpolation]
        rgb = rgb.resize(content[::-1], resampling, box=preprocessing.source_box(width, height))
    if content != (preprocessing.height, preprocessing.width):
        padded = Image.new("RGB", (preprocessing.width, preprocessing.height), preprocessing.padding_colour)
        padded.paste(rgb, preprocessing.content_box(width, height))
        rgb = padded
    return Decoded(np.asarray(rgb), width, height, len(data))


@_decoding_errors()
def decode_picture(data: bytes, preprocessing: Preprocessing, shorter: int, longest: int) -> Pixels:
    """What the model sees of an image, in its own proportions, for people to look at: (H, W, 3) uint8 RGB.

    Args:
        data: the file.
        preprocessing: the model's.
        shorter: pixels of the shorter side, unless the longer one would be above `longest`.
        longest: pixels that the longer side may have.

    Raises:
        ImageError: if it cannot be read.
    """
    image = _open(data, MAX_PIXELS)
    size = preprocessing.picture_size(*image.size, shorter, longest)
    box = preprocessing.source_box(*image.size)
    return np.asarray(_as_rgb(image).resize(size, Image.Resampling.BILINEAR, box=box))


@_decoding_errors()
def read_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of an image, from its header alone.

    Raises:
        ImageError: if it has none that can be read.
    """
    return _open_header(data, max_pixels).size


@_decoding_errors()
def decode_mask(data: bytes, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.bool_]:
    """A ground-truth mask at its own size, (height, width) bool; any value above 0 is defect.

    Raises:
        ImageError: if it cannot be read.
    """
    image = _open(data, max_pixels)
    values = np.asarray(image if image.mode in ("L", "1") or image.mode.startswith("I") else image.convert("L"))
    return values > 0


def resize_mask(mask: npt.NDArray[np.bool_], preprocessing: Preprocessing) -> npt.NDArray[np.bool_]:
    """What the model sees of a mask, at the size of the image's anomaly map, by nearest neighbour."""
    image = Image.fromarray(mask.astype(np.uint8))
    height, width = preprocessing.content_shape(*image.size)
    box = preprocessing.source_box(*image.size)
    return np.asarray(image.resize((width, height), Image.Resampling.NEAREST, box=box)) > 0


def crop_mask(mask: npt.NDArray[np.bool_], preprocessing: Preprocessing) -> npt.NDArray[np.bool_]:
    """What the model sees of a mask, at the mask's own resolution."""
    left, top, right, bottom = map(round, preprocessing.source_box(mask.shape[1], mask.shape[0]))
    return mask[top : max(bottom, top + 1), left : max(right, left + 1)]


def resize_map(anomaly_map: npt.NDArray[np.float32], height: int, width: int) -> npt.NDArray[np.float32]:
    """An anomaly map at another size, (height, width) float32, linearly."""
    return np.asarray(Image.fromarray(anomaly_map).resize((width, height), Image.Resampling.BILINEAR))


def _open_header(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise ImageError("empty", "the file has no bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(
            "not_an_image", f"{len(data)} bytes that do not begin as {', '.join(FORMATS[:-1])} or {FORMATS[-1]} does"
        ) from error
    except Exception as error:
        raise ImageError("damaged", f"broken header: {error}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("too_large", f"{width}×{height} pixels, at most {max_pixels:,} are allowed")
    return image


def _open(data: bytes, max_pixels: int) -> Image.Image:
    image = _open_header(data, max_pixels)
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        width, height = image.size
        raise ImageError("damaged", f"{image.format} of {width}×{height}: {error}") from error
    return image


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, which turns almost all of a 16-bit image white.
        return Image.fromarray((np.asarray(image) // np.uint16(257)).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(
            "unsupported", f"{image.format} with 32 bits per pixel has no fixed range; save it with 8 or 16"
        )
    try:
        return image.convert("RGB")
    except Exception as error:
        raise ImageError("unsupported", f"{image.format} in mode {image.mode}: {error}") from error
