"""triage.html: the most anomalous images of a run on one static page, for the person who decides what to inspect."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from stpm import storage
from stpm.data import images
from stpm.data.encode import encode_jpeg
from stpm.method.false_discovery import Discoveries
from stpm.method.preprocessing import Preprocessing
from stpm.pages import jpeg_uri, score_parts, template, with_script_hash
from stpm.scoring.inputs.archives import read_uri
from stpm.scoring.output import RunOutput
from stpm.scoring.stages.heatmaps import overlay_png, read_heatmap

_HEATMAP = ["heatmap", "heatmap_png"]
_PARTS = ["student_score", "memory_score"]
_COLUMNS = ["uri", "category", "score", *_PARTS, "threshold", "p_value", "is_anomalous", "peak_x", "peak_y", *_HEATMAP]
# Pixels of a picture's shorter and longer side, at most.
_MAX_SHORT_SIDE, _MAX_LONG_SIDE = 256, 1024
_READERS = 8
# Thresholds are at least this in the division by them.
_MIN_THRESHOLD = 1e-30

log = logging.getLogger(__name__)


def write_triage(
    output: RunOutput,
    max_images: int,
    preprocessing: Mapping[str, Preprocessing],
    discoveries: Discoveries | None = None,
) -> None:
    """Write the page, with its pictures embedded, to the run's state folder.

    Args:
        output: of a run that has scored all images.
        max_images: images on the page.
        preprocessing: of each category's model.
        discoveries: of the run, if it looked for them: they come first on the page, and are marked.
    """
    cut_off = discoveries.cut_off if discoveries else 0.0
    rows = most_anomalous(output, max_images, cut_off)
    with ThreadPoolExecutor(_READERS) as pool:
        pictures = list(pool.map(lambda row: _picture(output, row, preprocessing[row["category"]]), rows))
    shown = [row | {"picture": picture, "parts": score_parts(row)} for row, picture in zip(rows, pictures, strict=True)]
    page = template("scoring/triage.html").render(rows=shown, folder=output.folder, discoveries=discoveries)
    storage.publish(output.triage, with_script_hash(page).encode())


def _picture(output: RunOutput, row: Mapping[str, Any], preprocessing: Preprocessing) -> str:
    """Draw an image with its heatmap, if there is one, as a data URI; return "" if the image cannot be read."""
    try:
        pixels = images.decode_picture(read_uri(row["uri"]), preprocessing, _MAX_SHORT_SIDE, _MAX_LONG_SIDE)
        heatmap = read_heatmap(output.folder, row)
        return jpeg_uri(encode_jpeg(Image.fromarray(overlay_png(pixels, heatmap) if heatmap else pixels)))
    except Exception:
        log.warning("%s is not shown", row["uri"], exc_info=True)
        return ""


def most_anomalous(output: RunOutput, max_images: int, cut_off: float = 0.0) -> list[dict[str, Any]]:
    """Select the rows whose scores exceed their model's threshold the most, in that order, a batch at a time.

    Rows with a p-value of at most `cut_off` come before all others.
    """
    best: list[tuple[bool, float, str, dict[str, Any]]] = []
    for batch in output.dataset().to_batches(_COLUMNS):
        for row in batch.to_pylist():
            if row["score"] is not None:
                heapq.heappush(best, (cut_off > 0 and row["p_value"] <= cut_off, _excess(row), row["uri"], row))
                if len(best) > max_images:
                    heapq.heappop(best)
    ordered = sorted(best, key=lambda entry: entry[:3], reverse=True)
    return [row | {"is_discovery": is_discovery} for is_discovery, _, _, row in ordered]


def _excess(row: Mapping[str, Any]) -> float:
    """Compute how far a score is above its threshold, comparable over models.

    A sum of parts has the same scale in all models: take the difference. Otherwise divide it by the threshold.
    """
    score, threshold = float(row["score"]), float(row["threshold"])
    if any(row[name] is not None for name in _PARTS):
        return score - threshold
    return (score - threshold) / max(abs(threshold), _MIN_THRESHOLD)
