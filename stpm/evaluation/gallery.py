"""Pictures of test images with their masks' outlines, beside their heatmaps."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from stpm.data.encode import encode_jpeg, encode_png
from stpm.data.heatmaps import read_overlay
from stpm.data.masks import crop_mask, read_mask
from stpm.data.mvtec import GOOD
from stpm.errors import DataError
from stpm.evaluation.category import MASK_COLUMNS, ScoredCategory
from stpm.pages import view_scores

_COUNT = 4
# Pixels: sides of an image in the sheet and in a gallery, space between images, height of a caption.
_SHEET_SIZE, _GALLERY_SIZE, _GAP, _CAPTION = 256, 160, 8, 40
_OUTLINE = (0, 255, 255)
_SCORES = ("score", "fine_score", "coarse_score", "is_anomalous")
_COLUMNS = (*MASK_COLUMNS, "archive_start", "archive_length", *_SCORES, "heatmap", "heatmap_png")

Row = dict[str, Any]

log = logging.getLogger(__name__)


class Tile(NamedTuple):
    """One image of a gallery: its name, what was found, and a JPEG of it beside its heatmap."""

    name: str
    found: str
    picture: bytes


def defect_sheet(category: ScoredCategory) -> bytes | None:
    """Draw four defects with their heatmaps as a PNG, or return None if no defect has a heatmap.

    Take defect types in turn, and images by name: scores play no part in the choice.
    """
    by_type: dict[str, list[Row]] = {}
    for row in category.rows(_COLUMNS).to_pylist():
        if _is_defect(row) and (row["heatmap"] or row["heatmap_png"]):
            by_type.setdefault(row["label"], []).append(row)
    turns = zip_longest(*(by_type[label] for label in sorted(by_type)))
    rows = [row for turn in turns for row in turn if row]
    width, height = 2 * _SHEET_SIZE + _GAP, _SHEET_SIZE + _CAPTION
    sheet = Image.new("RGB", (2 * width + 3 * _GAP, 2 * height + 3 * _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    cells = list(islice(_pairs(category, rows, _SHEET_SIZE), _COUNT))
    for number, (row, pair) in enumerate(cells):
        left, top = _GAP + number % 2 * (width + _GAP), _GAP + number // 2 * (height + _GAP)
        sheet.paste(pair, (left, top))
        draw.text((left + 2, top + pair.height + 3), "\n".join(_caption(row)), fill="black", font=font)
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
            Tile(*_caption(row), encode_jpeg(pair))
            for row, pair in islice(_pairs(category, rows, _GALLERY_SIZE), max_tiles)
        ]
        for title, rows in chosen.items()
    }


def _is_defect(row: Row) -> bool:
    return row["label"] not in ("", GOOD)


def _caption(row: Row) -> tuple[str, str]:
    """Name an image by its folder and file, and say what was found."""
    views = view_scores(row)
    verdict = "anomalous" if row["is_anomalous"] else "not anomalous"
    found = f"{row['label']}, score {row['score']:.3g}{views and f' ({views})'}, {verdict}"
    return "/".join(row["uri"].split("/")[-2:]), found


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
    pixels, overlaid = read_overlay(row, category.output.folder, category.preprocessing, size, size)
    outlined = Image.fromarray(pixels)
    try:
        mask = crop_mask(read_mask(*(row[name] for name in MASK_COLUMNS)), category.preprocessing)
    except DataError:
        # The category's problems already name it.
        mask = np.zeros((1, 1), bool)
    inside = Image.fromarray(mask).resize(outlined.size, Image.Resampling.NEAREST)
    edge = np.asarray(inside) & ~binary_erosion(inside, iterations=2)
    outlined.paste(_OUTLINE, mask=Image.fromarray(edge))
    pair = Image.new("RGB", (2 * size + _GAP, size), "white")
    left, top = (size - outlined.width) // 2, (size - outlined.height) // 2
    pair.paste(outlined, (left, top))
    if overlaid is not None:
        pair.paste(Image.fromarray(overlaid), (size + _GAP + left, top))
    return pair
