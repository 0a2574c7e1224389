"""A picture per category: four defects, each beside its heatmap."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from stpm import images, storage
from stpm.evaluation.category import read_rows
from stpm.mvtec import GOOD
from stpm.scoring.target import Target

_CELLS = 4
_TILE = 256
_GAP = 8
_CAPTION = 22
_BACKGROUND, _INK = "white", "black"


def gallery(target: Target, category: str, view: images.View) -> bytes | None:
    """A 2×2 PNG of defects with their heatmaps, or None if no defect was scored.

    The defect types take turns, each giving its images in the order of their names: none is picked for its score.

    Args:
        target: the pass that scored the category's test images, with heatmaps.
        category: its name.
        view: what the model saw of each image.
    """
    rows = read_rows(target, category, ("uri", "label", "score", "overlay", "is_anomalous")).to_pylist()
    chosen = _take_turns([row for row in rows if row["overlay"] and row["label"] != GOOD])
    if not chosen:
        return None
    width, height = 2 * _TILE + _GAP, _TILE + _CAPTION
    sheet = Image.new("RGB", (2 * width + 3 * _GAP, 2 * height + 3 * _GAP), _BACKGROUND)
    for place, row in enumerate(chosen):
        sheet.paste(_cell(target, row, view), (_GAP + place % 2 * (width + _GAP), _GAP + place // 2 * (height + _GAP)))
    sink = io.BytesIO()
    sheet.save(sink, "PNG")
    return sink.getvalue()


def _take_turns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    turns = max(map(len, by_label.values()), default=0)
    return [of[turn] for turn in range(turns) for of in by_label.values() if turn < len(of)][:_CELLS]


def _cell(target: Target, row: dict[str, Any], view: images.View) -> Image.Image:
    cell = Image.new("RGB", (2 * _TILE + _GAP, _TILE + _CAPTION), _BACKGROUND)
    original = Image.fromarray(images.decode(storage.read(row["uri"]), dataclasses.replace(view, size=_TILE)).pixels)
    with Image.open(io.BytesIO(storage.read(storage.join(target.out, row["overlay"])))) as overlay:
        cell.paste(original, (0, 0))
        cell.paste(overlay.resize((_TILE, _TILE)), (_TILE + _GAP, 0))
    verdict = "anomalous" if row["is_anomalous"] else "missed at this threshold"
    name = row["uri"].rsplit("/", 1)[-1]
    ImageDraw.Draw(cell).text(
        (2, _TILE + 3),
        f"{row['label']}/{name}   score {row['score']:.3g}   {verdict}",
        fill=_INK,
        font=ImageFont.load_default(14),
    )
    return cell
