"""Heatmaps as pictures: their colours, their PNG, and how they lie over an image."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from stpm import storage
from stpm.data.encode import encode_png
from stpm.data.images import Pixels

# See `encode_png`.
_COMPRESSION = 1


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
    return encode_png(image, _COMPRESSION)


def overlay(pixels: Pixels, levels: Pixels) -> Pixels:
    """Draw a heatmap over an image at half opacity.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        levels: (H, W) uint8 grey levels.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    colours = coloured(levels)
    # The mean, rounded up, of bytes: several times as fast as a sum of wider integers.
    return (pixels | colours) - ((pixels ^ colours) >> 1)


def overlay_heatmap(pixels: Pixels, heatmap_png: bytes) -> Pixels:
    """Draw a heatmap made by `palette_png` over an image of any size, (H, W, 3) uint8 RGB."""
    with Image.open(io.BytesIO(heatmap_png), formats=["PNG"]) as image:
        levels = Image.fromarray(np.asarray(image)).resize(pixels.shape[1::-1], Image.Resampling.BILINEAR)
    return overlay(pixels, np.asarray(levels))


def read_heatmap(out: str, row: Mapping[str, Any]) -> bytes:
    """Read the palette PNG of a row of OUTPUT, from its file or from the row; empty if there is none. Raise OSError."""
    if row["heatmap"]:
        return storage.read(storage.join(out, row["heatmap"]))
    return row["heatmap_png"] or b""
