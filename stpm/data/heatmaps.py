"""Anomaly maps as pictures: the heatmap's colours, its PNG, and how it lies over the image."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from stpm import storage
from stpm.data import decoding, image_files
from stpm.data.decoding import Pixels
from stpm.data.encode import encode_png
from stpm.data.image_files import ImageRef
from stpm.data.rois import read_roi
from stpm.method.preprocessing import Preprocessing
from stpm.method.scales import GOOD_MAX_LEVEL

# Of several threads, one decodes images of more pixels than this: one of MAX_PIXELS takes 0.8 GB, and each thread keeps
# the memory that it has freed.
_SMALL_PIXELS = 2**22
_LARGE = ThreadPoolExecutor(1)
# Of an image whose shorter side is below so many pixels, outlines are one pixel wide; of twice the size, two.
_LINE = 300

log = logging.getLogger(__name__)


def jet_palette() -> npt.NDArray[np.uint8]:
    """Make the colour map "jet", (256, 3) uint8 RGB: piecewise linear from blue over green to red."""
    x = np.linspace(0.0, 1.0, 256)
    rgb = np.stack([1.5 - np.abs(4 * x - centre) for centre in (3.0, 2.0, 1.0)], axis=1)
    return np.round(np.clip(rgb, 0.0, 1.0) * 255).astype(np.uint8)


_PALETTE = jet_palette()
# A heatmap over an image shows nothing below this level, and then a tint that can be seen: the defects that a threshold
# misses are weak. What is above all good pixels has a contour.
FIRST_LEVEL = 16
# Levels that are free for lines, as those below the first have no colour.
_CONTOUR, _MASK_OUTLINE = 1, 2
# The colour of each level over an image, and of lines, with its opacity: (256, 4) uint8 RGBA.
_OPACITY = np.interp(np.arange(256), (FIRST_LEVEL, GOOD_MAX_LEVEL, 255), (50, 130, 160))
OVERLAY_COLOURS: npt.NDArray[np.uint8] = np.column_stack([_PALETTE, _OPACITY.astype(np.uint8)])
OVERLAY_COLOURS[:FIRST_LEVEL] = 0
OVERLAY_COLOURS[[_CONTOUR, _MASK_OUTLINE]] = (255, 255, 255, 255), (0, 255, 255, 255)


def coloured(levels: Pixels) -> Pixels:
    """Colour grey levels of any shape: one more axis, uint8 RGB."""
    return _PALETTE.take(levels, axis=0)


def palette_png(levels: Pixels) -> bytes:
    """Encode (H, W) uint8 grey levels as a palette PNG, in which the index of a pixel is its grey level."""
    return encode_png(_indexed(levels, "RGB", _PALETTE), compress_level=1)


def overlay(pixels: Pixels, levels: Pixels) -> Pixels:
    """Draw a heatmap, (H, W) uint8 grey levels, over an image; both image and result are (H, W, 3) uint8.

    Pixels below FIRST_LEVEL stay as they are. A line surrounds what is above the largest pixel of good images.
    """
    if levels.max() < FIRST_LEVEL:
        return pixels
    picture, layer = Image.fromarray(pixels), _layer(levels).convert("RGBA")
    picture.paste(layer, mask=layer)
    return np.asarray(picture)


def overlay_png(levels: Pixels) -> bytes:
    """Encode a heatmap as the transparent PNG that, laid over an image, gives the `overlay`."""
    return encode_png(_layer(levels))


def mask_png(mask: npt.NDArray[np.bool_]) -> bytes:
    """Encode the outline of an (H, W) mask as a transparent PNG."""
    return encode_png(_indexed(_outline(mask) * np.uint8(_MASK_OUTLINE), "RGBA", OVERLAY_COLOURS))


def _layer(levels: Pixels) -> Image.Image:
    shown = levels * (levels >= FIRST_LEVEL)
    shown[_outline(levels > GOOD_MAX_LEVEL)] = _CONTOUR
    return _indexed(shown, "RGBA", OVERLAY_COLOURS)


def _indexed(indices: Pixels, mode: Literal["RGB", "RGBA"], colours: Pixels) -> Image.Image:
    image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    image.putpalette(colours.tobytes(), mode)
    return image


def _outline(inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Find the pixels of an (H, W) region within a line's width of its border, but not at that of the image."""
    if not inside.any():
        return inside
    # Processes that draw no outline do not load it.
    from scipy.ndimage import minimum_filter

    width = 1 + min(inside.shape) // _LINE
    inner: npt.NDArray[np.bool_] = minimum_filter(inside, 2 * width + 1, mode="nearest")
    return inside & ~inner


def resize_map(anomaly_map: npt.NDArray[np.float32], height: int, width: int) -> npt.NDArray[np.float32]:
    """Resize an anomaly map bilinearly: (height, width) float32. NaN stays what it covers, and spreads no further."""

    def resize(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        resized: npt.NDArray[np.float32] = np.asarray(
            Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)
        )
        return resized

    if not (outside := np.isnan(anomaly_map)).any():
        return resize(anomaly_map)
    inside = resize((~outside).astype(np.float32))
    values: npt.NDArray[np.float32] = resize(np.nan_to_num(anomaly_map, nan=0.0)) / np.maximum(inside, np.float32(1e-6))
    values[inside < min(0.5, inside.max())] = np.nan
    return values


def read_shown(
    row: Mapping[str, Any], out: str, preprocessing: Preprocessing, shorter: int, longest: int
) -> tuple[Pixels, Pixels | None] | None:
    """Read the image of a row of OUTPUT, see `decode_picture`, and its heatmap's grey levels at the same size.

    What is not inspected is paler; the row may lack the column `roi`.

    Returns:
        (H, W, 3) and (H, W) uint8, None for no heatmap. None, after a warning, if one of them cannot be read.
    """
    try:
        pixels = _read_picture(row, preprocessing, shorter, longest)
        png = storage.read(storage.join(out, row["heatmap"])) if row["heatmap"] else row["heatmap_png"]
        if not png:
            return pixels, None
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            levels = Image.fromarray(np.asarray(image)).resize(pixels.shape[1::-1], Image.Resampling.BILINEAR)
    except Exception as error:  # noqa: BLE001
        log.warning("%s is not shown: %s: %s", row["uri"], type(error).__name__, error)
        return None
    return pixels, np.asarray(levels)


def _read_picture(row: Mapping[str, Any], preprocessing: Preprocessing, shorter: int, longest: int) -> Pixels:
    image = ImageRef.of_row(row)
    data = image_files.read_small(image)
    roi = read_roi(row["roi"]) if row.get("roi") else None
    if data is not None and math.prod(decoding.read_size(data)) <= _SMALL_PIXELS:
        return decoding.decode_picture(data, preprocessing, shorter, longest, roi)

    def decode() -> Pixels:
        whole = image_files.read(image) if data is None else data
        return decoding.decode_picture(whole, preprocessing, shorter, longest, roi)

    return _LARGE.submit(decode).result()
