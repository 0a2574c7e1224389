"""Galleries of test images: their masks' outlines, heatmaps, scores and thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from stpm.data.masks import crop_mask, read_mask
from stpm.data.mvtec import GOOD
from stpm.errors import DataError
from stpm.evaluation.category import MASK_COLUMNS, ScoredCategory
from stpm.method.scales import HeatmapScale
from stpm.models.record import ModelRecord
from stpm.pages.tiles import Tile, draw_tile

# A page has at most so many images of each category's largest scores, missed defects and false alarms.
_LARGEST, _MAX_TILES = 8, 60
# Pixels of a picture's longer side.
_SIZE = 192
_SCORES = ("score", "fine_score", "coarse_score", "threshold", "is_anomalous", "regions")
_COLUMNS = (*MASK_COLUMNS, "archive_start", "archive_length", "roi", *_SCORES, "heatmap", "heatmap_png")

Row = dict[str, Any]


class Gallery(NamedTuple):
    """The first of so many images, without those that can no longer be read."""

    tiles: Sequence[Tile]
    total: int


def galleries(category: ScoredCategory, scale: HeatmapScale) -> dict[str, Gallery]:
    """Show the largest scores, the missed defects and the false alarms, by title, the clearest cases first."""
    rows = [row for row in category.rows(_COLUMNS).to_pylist() if row["score"] is not None]
    rows.sort(key=lambda row: -row["score"])
    missed = [row for row in reversed(rows) if row["label"] not in ("", GOOD) and not row["is_anomalous"]]
    alarms = [row for row in rows if row["label"] == GOOD and row["is_anomalous"]]
    return {
        "Missed defects": _gallery(category, scale, missed, _MAX_TILES),
        "False alarms": _gallery(category, scale, alarms, _MAX_TILES),
        "Largest scores": _gallery(category, scale, rows, _LARGEST),
    }


def draw_images(category: ScoredCategory, model: ModelRecord, uris: Sequence[str]) -> dict[str, Tile]:
    """Draw the first of some images of a category, by URI."""
    rows = category.rows(_COLUMNS, uris[:_MAX_TILES]).to_pylist()
    return {row["uri"]: _draw(category, model.heatmap_scale, row) for row in rows}


def _gallery(category: ScoredCategory, scale: HeatmapScale, rows: Sequence[Row], max_tiles: int) -> Gallery:
    drawn = (_draw(category, scale, row) for row in rows)
    return Gallery(list(islice((tile for tile in drawn if tile.picture), max_tiles)), len(rows))


def _draw(category: ScoredCategory, scale: HeatmapScale, row: Row) -> Tile:
    try:
        mask = crop_mask(read_mask(*(row[name] for name in MASK_COLUMNS)), category.preprocessing)
    except DataError:
        # The category's problems already name it.
        mask = None
    return draw_tile(row, category.output.folder, category.preprocessing, scale, (_SIZE, _SIZE), mask)
