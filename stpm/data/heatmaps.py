"""Anomaly maps as pictures: the heatmap's colours, its PNG, and how it lies over the image."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from stpm import storage
from stpm.data import decoding, image_files
from stpm.data.decoding import Pixels
from stpm.data.encode import encode_png
from stpm.data.image_files import ImageRef
from stpm.method.preprocessing import Preprocessing

# Of several threads, one decodes images of more pixels than this: one of MAX_PIXELS takes 0.8 GB, and each thread keeps
# the memory that it has freed.
_SMALL_PIXELS = 2**22
_LARGE = ThreadPoolExecutor(1)


def jet_palette() -> npt.NDArray[np.uint8]:
    """Make the colour map "jet", (256, 3) uint8 RGB: piecewise linear from blue over green to red."""
    x = np.linspace(0.0, 1.0, 256)
    rgb = np.stack([1.5 - np.abs(4 * x - centre) for centre in (3.0, 2.0, 1.0)], axis=1)
    return np.round(np.clip(rgb, 0.0, 1.0) * 255).astype(np.uint8)


_PALETTE = jet_palette()


def coloured(levels: Pixels) -> Pixels:
    """Colour grey levels of any shape: one more axis, uint8 RGB."""
    return _PALETTE.take(levels, axis=0)


def palette_png(levels: Pixels) -> bytes:
    """Encode (H, W) uint8 grey levels as a palette PNG, in which the index of a pixel is its grey level."""
    image = Image.frombytes("P", levels.shape[::-1], levels.tobytes())
    image.putpalette(_PALETTE.tobytes())
    return encode_png(image, compress_level=1)


def overlay(pixels: Pixels, levels: Pixels) -> Pixels:
    """Draw a heatmap, (H, W) uint8 grey levels, over an image at half opacity; both image and result are (H, W, 3)."""
    colours = coloured(levels)
    # The mean, rounded up, of bytes: several times as fast as a sum of wider integers.
    return (pixels | colours) - ((pixels ^ colours) >> 1)


def resize_map(anomaly_map: npt.NDArray[np.float32], height: int, width: int) -> npt.NDArray[np.float32]:
    """Resize an anomaly map bilinearly: (height, width) float32."""
    return np.asarray(Image.fromarray(anomaly_map).resize((width, height), Image.Resampling.BILINEAR))


def read_overlay(
    row: Mapping[str, Any], out: str, preprocessing: Preprocessing, shorter: int, longest: int
) -> tuple[Pixels, Pixels | None]:
    """Read the image of a row of OUTPUT, see `decode_picture`, and draw its heatmap over it, if it has one.

    Raises:
        ImageError: if the image cannot be read.
        OSError: if the heatmap cannot be read.
    """
    pixels = _read_picture(row, preprocessing, shorter, longest)
    png = read_heatmap(out, row)
    if not png:
        return pixels, None
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        levels = Image.fromarray(np.asarray(image)).resize(pixels.shape[1::-1], Image.Resampling.BILINEAR)
    return pixels, overlay(pixels, np.asarray(levels))


def _read_picture(row: Mapping[str, Any], preprocessing: Preprocessing, shorter: int, longest: int) -> Pixels:
    image = ImageRef.of_row(row)
    data = image_files.read_small(image)
    if data is not None and math.prod(decoding.read_size(data)) <= _SMALL_PIXELS:
        return decoding.decode_picture(data, preprocessing, shorter, longest)

    def decode() -> Pixels:
        whole = image_files.read(image) if data is None else data
        return decoding.decode_picture(whole, preprocessing, shorter, longest)

    return _LARGE.submit(decode).result()


def read_heatmap(out: str, row: Mapping[str, Any]) -> bytes:
    """Read the palette PNG of a row of OUTPUT, from its file or from the row; empty if there is none. Raise OSError."""
    if row["heatmap"]:
        return storage.read(storage.join(out, row["heatmap"]))
    return row["heatmap_png"] or b""
