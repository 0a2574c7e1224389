"""An image of a run as pages show it: the picture, and beside it the picture under its heatmap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from stpm.data.encode import encode_jpeg
from stpm.data.heatmaps import mask_png, overlay_png, read_shown
from stpm.data.masks import Mask
from stpm.method.preprocessing import Preprocessing
from stpm.method.scales import HeatmapScale
from stpm.pages import data_uri, view_scores


class Tile(NamedTuple):
    """One image: its row of OUTPUT, and pictures of one size, as data URIs, which the page lays over each other.

    Args:
        row: the values of its row.
        views: what each of two views has seen, see `view_scores`.
        scale: of the heatmap, to draw the bar of its colours.
        picture: the JPEG of the part that the model sees; "" if it can no longer be read.
        heatmap: a transparent PNG; "" if there is none.
        outline: the same of the mask.
        size: width and height, pixels.
    """

    row: Mapping[str, Any]
    views: str
    scale: HeatmapScale
    picture: str = ""
    heatmap: str = ""
    outline: str = ""
    size: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """Return the image's folder and file."""
        return "/".join(self.row["uri"].split("/")[-2:])

    def position(self, value: float) -> str:
        """Return where a value of the anomaly map, or a score, is in the bar of colours, as percentage for CSS."""
        return f"{self.scale.apply(np.float64(value)) / 2.55:.1f}%"


def draw_tile(
    row: Mapping[str, Any],
    out: str,
    preprocessing: Preprocessing,
    scale: HeatmapScale,
    sides: tuple[int, int],
    mask: Mask | None = None,
) -> Tile:
    """Draw the image of a row, see `read_shown`, with a shorter and a longer side of at most so many pixels.

    A mask is that of the part that the model sees, of any size.
    """
    tile = Tile(row, view_scores(row), scale)
    if (found := read_shown(row, out, preprocessing, *sides)) is None:
        return tile
    pixels, levels = found
    height, width = pixels.shape[:2]
    inside = (
        None
        if mask is None or not mask.any()
        else Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    )
    return tile._replace(
        picture=data_uri("jpeg", encode_jpeg(Image.fromarray(pixels))),
        heatmap="" if levels is None else data_uri("png", overlay_png(levels)),
        outline="" if inside is None else data_uri("png", mask_png(np.asarray(inside))),
        size=(width, height),
    )
