"""Pictures of what was found and missed: the image with its mask's outline beside its heatmap."""

from __future__ import annotations

import dataclasses
import io
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from stpm import images
from stpm.errors import DataError
from stpm.evaluation.category import ground_truth, read_rows
from stpm.mvtec import GOOD
from stpm.pages import jpeg, score_parts
from stpm.preprocessing import Preprocessing
from stpm.scoring.archives import read_uri
from stpm.scoring.heatmaps import heat_over, written_heatmap
from stpm.scoring.target import Target

_CELLS = 4
_TILE = 256
_SMALL = 160
_GAP = 8
_CAPTION = 22
_BACKGROUND, _INK, _OUTLINE = "white", "black", (0, 255, 255)
_SCORES = ("score", "student_score", "memory_score", "is_anomalous")
_COLUMNS = ("uri", "label", "mask", "width", "height", *_SCORES, "heatmap", "heatmap_png")

Row = dict[str, Any]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Tile:
    """One image of a gallery: `picture` is a JPEG, the image beside its heatmap.

    `parts` says in words what adds up to the score.
    """

    uri: str
    label: str
    score: float
    parts: str
    is_anomalous: bool
    picture: bytes


def sheet(target: Target, category: str, preprocessing: Preprocessing) -> bytes | None:
    """A 2×2 PNG of defects with their heatmaps, or None if no defect was scored.

    The defect types take turns, each giving its images in the order of their names: none is picked for its score.

    Args:
        target: the pass that scored the category's test images, with heatmaps.
        category: its name.
        preprocessing: that of the category's model.
    """
    rows = read_rows(target, category, _COLUMNS).to_pylist()
    defects = _take_turns([row for row in rows if (row["heatmap"] or row["heatmap_png"]) and row["label"] != GOOD])
    cells = [_cell(row, pair) for row, pair in _pairs(target, defects, preprocessing, _TILE, _CELLS)]
    if not cells:
        return None
    width, height = cells[0].size
    page = Image.new("RGB", (2 * width + 3 * _GAP, 2 * height + 3 * _GAP), _BACKGROUND)
    for place, cell in enumerate(cells):
        page.paste(cell, (_GAP + place % 2 * (width + _GAP), _GAP + place // 2 * (height + _GAP)))
    sink = io.BytesIO()
    page.save(sink, "PNG")
    return sink.getvalue()


def galleries(target: Target, category: str, preprocessing: Preprocessing, most: int = _CELLS) -> dict[str, list[Tile]]:
    """The largest scores, the missed defects and the false alarms, each the most telling first.

    Args:
        target: the pass that scored the category's test images, with heatmaps.
        category: its name.
        preprocessing: that of the category's model.
        most: images of each kind.
    """
    rows = [row for row in read_rows(target, category, _COLUMNS).to_pylist() if row["score"] is not None]
    rows.sort(key=lambda row: -row["score"])
    kinds: dict[str, Sequence[Row]] = {
        "Largest scores": rows,
        "Missed defects": [row for row in reversed(rows) if row["label"] != GOOD and not row["is_anomalous"]],
        "False alarms": [row for row in rows if row["label"] == GOOD and row["is_anomalous"]],
    }
    return {
        kind: [
            Tile(row["uri"], row["label"], row["score"], score_parts(row), row["is_anomalous"], jpeg(pair))
            for row, pair in _pairs(target, chosen, preprocessing, _SMALL, most)
        ]
        for kind, chosen in kinds.items()
    }


def _pairs(
    target: Target, rows: Sequence[Row], preprocessing: Preprocessing, size: int, most: int
) -> Iterator[tuple[Row, Image.Image]]:
    """The first rows with their pictures. An image that can no longer be read is left out here, and in no figure."""
    for row in rows:
        if most == 0:
            return
        try:
            pair = _pair(target, row, preprocessing, size)
        except Exception:
            log.warning("%s is not shown", row["uri"], exc_info=True)
            continue
        yield row, pair
        most -= 1


def _take_turns(rows: list[Row]) -> list[Row]:
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    turns = max(map(len, by_label.values()), default=0)
    return [of[turn] for turn in range(turns) for of in by_label.values() if turn < len(of)]


def _cell(row: Row, pair: Image.Image) -> Image.Image:
    cell = Image.new("RGB", (pair.width, pair.height + _CAPTION), _BACKGROUND)
    cell.paste(pair, (0, 0))
    verdict = "anomalous" if row["is_anomalous"] else "missed at this threshold"
    name = row["uri"].rsplit("/", 1)[-1]
    ImageDraw.Draw(cell).text(
        (2, pair.height + 3),
        f"{row['label']}/{name}   score {row['score']:.3g}   {verdict}",
        fill=_INK,
        font=ImageFont.load_default(14),
    )
    return cell


def _pair(target: Target, row: Row, preprocessing: Preprocessing, size: int) -> Image.Image:
    """The image with its mask's outline, and right of it the same with its heatmap, if one was written.

    Each in the middle of a square, in its own proportions.
    """
    pair = Image.new("RGB", (2 * size + _GAP, size), _BACKGROUND)
    pixels = images.decode_picture(read_uri(row["uri"]), preprocessing, size, size)
    height, width = pixels.shape[:2]
    left, top = (size - width) // 2, (size - height) // 2
    if heat := written_heatmap(target.out, row):
        pair.paste(Image.fromarray(heat_over(pixels, heat)), (size + _GAP + left, top))
    outline = _outline(row, preprocessing, width, height)
    pixels = np.where(outline[..., None], np.array(_OUTLINE, np.uint8), pixels)
    pair.paste(Image.fromarray(pixels), (left, top))
    return pair


def _outline(row: Row, preprocessing: Preprocessing, width: int, height: int) -> npt.NDArray[np.bool_]:
    """Where the edge of a row's mask is, (height, width); nowhere if there is none, or it cannot be read."""
    try:
        mask = images.crop_mask(ground_truth(row), preprocessing)
    except DataError:
        # Evaluation names it among the problems.
        return np.zeros((height, width), bool)
    resized = Image.fromarray(mask.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    inside = np.asarray(resized) > 0
    edge: npt.NDArray[np.bool_] = inside & ~binary_erosion(inside, iterations=2)
    return edge
