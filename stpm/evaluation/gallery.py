"""Pictures of test images with their masks' outlines, beside their heatmaps."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from stpm.data import images
from stpm.data.encode import encode_jpeg, encode_png
from stpm.data.heatmaps import overlay_heatmap, read_heatmap, read_picture
from stpm.data.masks import read_mask
from stpm.data.mvtec import GOOD
from stpm.errors import DataError
from stpm.evaluation.category import MASK_COLUMNS, ScoredCategory
from stpm.method.preprocessing import Preprocessing
from stpm.pages import score_parts

_COUNT = 4
# Pixels: sides of an image in the sheet and in a gallery, space between images, height of a caption.
_SHEET_SIZE, _GALLERY_SIZE, _GAP, _CAPTION = 256, 160, 8, 22
_OUTLINE = (0, 255, 255)
_SCORES = ("score", "student_score", "memory_score", "is_anomalous")
_COLUMNS = (*MASK_COLUMNS, "archive_start", "archive_length", *_SCORES, "heatmap", "heatmap_png")

Row = dict[str, Any]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tile:
    """One image of a gallery, with a JPEG of it beside its heatmap, and the parts of its score as text."""

    uri: str
    label: str
    score: float
    parts: str
    is_anomalous: bool
    picture: bytes


def defect_sheet(category: ScoredCategory) -> bytes | None:
    """Draw four defects with their heatmaps as a PNG, or return None if no defect has a heatmap.

    Take defect types in turn, and images by name: scores play no part in the choice.
    """
    by_type: dict[str, list[Row]] = {}
    for row in category.rows(_COLUMNS).to_pylist():
        if _is_defect(row) and (row["heatmap"] or row["heatmap_png"]):
            by_type.setdefault(row["label"], []).append(row)
    turns = sorted((turn, label) for label, rows in by_type.items() for turn in range(len(rows)))
    rows = [by_type[label][turn] for turn, label in turns]
    width, height = 2 * _SHEET_SIZE + _GAP, _SHEET_SIZE + _CAPTION
    sheet = Image.new("RGB", (2 * width + 3 * _GAP, 2 * height + 3 * _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    cells = list(islice(_pairs(category, rows, _SHEET_SIZE), _COUNT))
    for number, (row, pair) in enumerate(cells):
        left, top = _GAP + number % 2 * (width + _GAP), _GAP + number // 2 * (height + _GAP)
        sheet.paste(pair, (left, top))
        found = "anomalous" if row["is_anomalous"] else "missed at this threshold"
        caption = f"{row['label']}/{row['uri'].rsplit('/', 1)[-1]}   score {row['score']:.3g}   {found}"
        draw.text((left + 2, top + pair.height + 3), caption, fill="black", font=font)
    return encode_png(sheet) if cells else None


def galleries(category: ScoredCategory, max_tiles: int = _COUNT) -> dict[str, list[Tile]]:
    """Show the largest scores, the missed defects and the false alarms, by title, the clearest cases first."""
    rows = [row for row in category.rows(_COLUMNS).to_pylist() if row["score"] is not None]
    rows.sort(key=lambda row: -row["score"])
    chosen: dict[str, Sequence[Row]] = {
        "Largest scores": rows,
        "Missed defects": [row for row in reversed(rows) if _is_defect(row) and not row["is_anomalous"]],
        "False alarms": [row for row in rows if row["label"] == GOOD and row["is_anomalous"]],
    }
    return {
        title: [
            Tile(row["uri"], row["label"], row["score"], score_parts(row), row["is_anomalous"], encode_jpeg(pair))
            for row, pair in islice(_pairs(category, rows, _GALLERY_SIZE), max_tiles)
        ]
        for title, rows in chosen.items()
    }


def _is_defect(row: Row) -> bool:
    return row["label"] not in ("", GOOD)


def _pairs(category: ScoredCategory, rows: Sequence[Row], size: int) -> Iterator[tuple[Row, Image.Image]]:
    """Yield rows with their pictures. Leave out images that can no longer be read."""
    for row in rows:
        try:
            pair = _pair(category, row, size)
        except Exception:
            log.warning("%s is not shown", row["uri"], exc_info=True)
            continue
        yield row, pair


def _pair(category: ScoredCategory, row: Row, size: int) -> Image.Image:
    """Draw an image with its mask's outline, and to its right the image under its heatmap, if there is one.

    Each is in the middle of a square, in the image's proportions.
    """
    pair = Image.new("RGB", (2 * size + _GAP, size), "white")
    pixels = read_picture(row, category.preprocessing, size, size)
    height, width = pixels.shape[:2]
    left, top = (size - width) // 2, (size - height) // 2
    if heatmap := read_heatmap(category.output.folder, row):
        pair.paste(Image.fromarray(overlay_heatmap(pixels, heatmap)), (size + _GAP + left, top))
    outlined = pixels.copy()
    outlined[_outline(row, category.preprocessing, width, height)] = _OUTLINE
    pair.paste(Image.fromarray(outlined), (left, top))
    return pair


def _outline(row: Row, preprocessing: Preprocessing, width: int, height: int) -> npt.NDArray[np.bool_]:
    """Find the edge of a row's mask, (height, width); nowhere if there is no mask."""
    try:
        mask = images.crop_mask(read_mask(*(row[name] for name in MASK_COLUMNS)), preprocessing)
    except DataError:
        # The category's problems already name it.
        return np.zeros((height, width), bool)
    resized = Image.fromarray(mask.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    inside = np.asarray(resized) > 0
    edge: npt.NDArray[np.bool_] = inside & ~binary_erosion(inside, iterations=2)
    return edge
