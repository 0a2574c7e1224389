"""From the bytes of an image file to uint8 RGB pixels at model size. Fitting and scoring share it.

Conventions: EXIF orientation is not applied, since masks and peak coordinates refer to the pixels as stored.
16-bit grey is divided by 257, the full range of its type, so that two images of one camera compare.
An alpha channel is dropped. Of an animation or a multi-page file the first frame is taken.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from stpm.errors import ImageError

Pixels = npt.NDArray[np.uint8]

ERROR_KINDS = (
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


Resize = Literal["stretch", "crop"]


@dataclass(frozen=True)
class View:
    """What a model sees of an image: `size` × `size` pixels of the whole, stretched, or of its central square."""

    size: int
    resize: Resize = "stretch"

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of that part, in pixels of an original of this width and height."""
        if self.resize == "stretch":
            return 0.0, 0.0, float(width), float(height)
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side

    def proportions(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in which that part has its own proportions, the shorter side `size`, neither over four."""
        left, top, right, bottom = self.box(width, height)
        sides = right - left, bottom - top
        across, down = (min(round(side * self.size / min(sides)), 4 * self.size) for side in sides)
        return across, down

    def to_original(self, x: int, y: int, width: int, height: int) -> tuple[int, int]:
        """The original's pixel under the centre of a pixel at model size."""
        left, top, right, bottom = self.box(width, height)
        return (
            int(left + (x + 0.5) * (right - left) / self.size),
            int(top + (y + 0.5) * (bottom - top) / self.size),
        )


@dataclass(frozen=True)
class Decoded:
    """Pixels at model size: (size, size, 3) uint8 RGB; width, height and size in bytes are those of the file."""

    pixels: Pixels
    width: int
    height: int
    bytes: int


def decode(data: bytes, view: View, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decode an image and bring what the view shows to model size, bilinearly with antialiasing.

    Raises:
        ImageError: whatever the bytes hold, nothing else is raised.
    """
    image = _open(data, max_pixels)
    width, height = image.size
    rgb = _as_rgb(image)
    if rgb.size != (view.size, view.size):
        rgb = rgb.resize((view.size, view.size), Image.Resampling.BILINEAR, box=view.box(width, height))
    return Decoded(np.asarray(rgb), width, height, len(data))


def decode_mask(data: bytes, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.bool_]:
    """A ground-truth mask at its own size, (height, width) bool; any value above 0 is defect.

    Raises:
        ImageError: if it cannot be read.
    """
    image = _open(data, max_pixels)
    values = np.asarray(image if image.mode in ("L", "1") or image.mode.startswith("I") else image.convert("L"))
    return values > 0


def resize_mask(mask: npt.NDArray[np.bool_], view: View) -> npt.NDArray[np.bool_]:
    """What the view shows of a mask, (size, size) bool, by nearest neighbour."""
    image = Image.fromarray(mask.astype(np.uint8))
    box = view.box(*image.size)
    return np.asarray(image.resize((view.size, view.size), Image.Resampling.NEAREST, box=box)) > 0


def seen_of_mask(mask: npt.NDArray[np.bool_], view: View) -> npt.NDArray[np.bool_]:
    """The part of a mask that the view shows, at its own resolution."""
    left, top, right, bottom = map(round, view.box(mask.shape[1], mask.shape[0]))
    return mask[top:bottom, left:right]


def resize_map(anomaly_map: npt.NDArray[np.float32], height: int, width: int) -> npt.NDArray[np.float32]:
    """An anomaly map at another size, (height, width) float32, linearly."""
    return np.asarray(Image.fromarray(anomaly_map).resize((width, height), Image.Resampling.BILINEAR))


def _open(data: bytes, max_pixels: int) -> Image.Image:
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
    try:
        image.load()
    except Exception as error:
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
