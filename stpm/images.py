"""From the bytes of an image file to uint8 RGB pixels at model size. Fitting and scoring share it.

Conventions: EXIF orientation is not applied, since masks and peak coordinates refer to the pixels as stored.
16-bit grey is divided by 257, the full range of its type, so that two images of one camera compare.
An alpha channel is dropped. Of an animation or a multi-page file the first frame is taken.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from stpm.errors import ImageError
from stpm.preprocessing import Preprocessing

Pixels = npt.NDArray[np.uint8]

ERROR_KINDS = (
    "bad_name",
    "not_allowed",
    "missing",
    "unreadable",
    "timeout",
    "empty",
    "not_an_image",
    "damaged",
    "too_large",
    "unsupported",
    "no_model",
    "out_of_memory",
)
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MAX_PIXELS = 100_000_000

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


def read_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of an image, from its header alone.

    Raises:
        ImageError: if it has none that can be read.
    """
    return _open_header(data, max_pixels).size


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
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise ImageError("not_an_image", f"{len(data)} bytes that no image format begins with") from error
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
    except Exception as error:
        width, height = image.size
        raise ImageError("damaged", f"{image.format} of {width}×{height}: {error}") from error
    return image


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, which turns almost all of a 16-bit image white.
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(
            "unsupported", f"{image.format} with 32 bits per pixel has no fixed range; save it with 8 or 16"
        )
    try:
        return image.convert("RGB")
    except Exception as error:
        raise ImageError("unsupported", f"{image.format} in mode {image.mode}: {error}") from error
