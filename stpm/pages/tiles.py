"""An image of a run as pages show it: the picture, and beside it the picture under its heatmap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from stpm.data.encode import encode_jpeg
from stpm.data.heatmaps import mask_png, overlay_png, read_shown
from stpm.data.masks import Mask
from stpm.method.preprocessing import Preprocessing
from stpm.method.scales import HeatmapScale
from stpm.pages import data_uri


class Tile(NamedTuple):
    """One image: its row of OUTPUT, the scale of its heatmap, and data URIs of one width and height, in pixels.

    They are a JPEG of what the model sees, "" if it can no longer be read, and transparent PNGs that lie over it.
    The regions are in pixels of the image itself, and so is the box `seen`, of what the model sees.
    """

    row: Mapping[str, Any]
    scale: HeatmapScale
    picture: str = ""
    heatmap: str = ""
    outline: str = ""
    size: tuple[int, int] = (0, 0)
    regions: Sequence[Mapping[str, Any]] = ()
    seen: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)


def draw_tile(
    row: Mapping[str, Any],
    out: str,
    preprocessing: Preprocessing,
    scale: HeatmapScale,
    sides: tuple[int, int],
    mask: Mask | None = None,
) -> Tile:
    """Draw the image of a row with a shorter and a longer side of at most so many pixels, see `read_shown`.

    A mask is that of the part that the model sees, of any size.
    """
    if (shown := read_shown(row, out, preprocessing, *sides)) is None:
        return Tile(row, scale)
    pixels, levels = shown
    size, outline = pixels.shape[1::-1], ""
    if mask is not None and mask.any():
        resized = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
        outline = data_uri("png", mask_png(np.asarray(resized)))
    heatmap = "" if levels is None else data_uri("png", overlay_png(levels))
    picture = data_uri("jpeg", encode_jpeg(Image.fromarray(pixels)))
    seen = preprocessing.source_box(row["width"], row["height"])
    return Tile(row, scale, picture, heatmap, outline, size, row["regions"] or (), seen)
