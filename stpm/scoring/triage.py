"""triage.html: the most anomalous images of a pass on one static page, for the person who decides what to look at."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from stpm import storage
from stpm.data import images
from stpm.method.preprocessing import Preprocessing
from stpm.pages import jpeg, jpeg_uri, score_parts, template
from stpm.scoring.inputs.archives import read_uri
from stpm.scoring.output import RunOutput
from stpm.scoring.stages.heatmaps import overlay_png, read_heatmap

_HEATMAP = ["heatmap", "heatmap_png"]
_PARTS = ["student_score", "memory_score"]
_COLUMNS = ["uri", "category", "score", *_PARTS, "threshold", "p_value", "is_anomalous", "peak_x", "peak_y", *_HEATMAP]
# Pixels of the shorter and of the longer side of a picture.
_SHORTER, _LONGEST = 256, 1024
_READERS = 8
# So that a threshold of 0 has an order too.
_LEAST_THRESHOLD = 1e-30

log = logging.getLogger(__name__)


def write_triage(output: RunOutput, most: int, preprocessing: Mapping[str, Preprocessing]) -> int:
    """Write the page beside the run's record, its pictures in it; returns how many images are on it.

    Images of different models are ordered by how far they are above their model's threshold.

    Args:
        output: a pass that has ended.
        most: images on the page.
        preprocessing: that of each category's model.
    """
    rows = most_anomalous(output, most)
    with ThreadPoolExecutor(_READERS) as pool:
        pictures = list(pool.map(lambda row: _picture(output, row, preprocessing[row["category"]]), rows))
    shown = [row | {"picture": picture, "parts": score_parts(row)} for row, picture in zip(rows, pictures, strict=True)]
    page = template("scoring/triage.html").render(rows=shown, out=output.out)
    storage.publish(output.triage, page.encode())
    return len(rows)


def _picture(output: RunOutput, row: Mapping[str, Any], preprocessing: Preprocessing) -> str:
    """The image with its heatmap over it, if one was written, as a data URI; "" if it can no longer be read."""
    try:
        pixels = images.decode_picture(read_uri(row["uri"]), preprocessing, _SHORTER, _LONGEST)
        heat = read_heatmap(output.out, row)
        return jpeg_uri(jpeg(Image.fromarray(overlay_png(pixels, heat) if heat else pixels)))
    except Exception:
        log.warning("%s is not shown", row["uri"], exc_info=True)
        return ""


def most_anomalous(output: RunOutput, most: int) -> list[dict[str, Any]]:
    """The rows whose scores are farthest above their threshold, first; a few in memory at a time."""
    best: list[tuple[float, str, dict[str, Any]]] = []
    for batch in output.dataset().to_batches(_COLUMNS):
        for row in batch.to_pylist():
            if row["score"] is not None:
                excess = _excess(row)
                heapq.heappush(best, (excess, row["uri"], row | {"excess": excess}))
                if len(best) > most:
                    heapq.heappop(best)
    return [row for _, _, row in sorted(best, key=lambda entry: entry[:2], reverse=True)]


def _excess(row: Mapping[str, Any]) -> float:
    """How far a score is above its threshold.

    The difference, where scores are sums of parts that have one scale for all models; else in units of the threshold.
    """
    score, threshold = float(row["score"]), float(row["threshold"])
    if any(row[name] is not None for name in _PARTS):
        return score - threshold
    return (score - threshold) / max(abs(threshold), _LEAST_THRESHOLD)
