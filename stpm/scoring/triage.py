"""triage.html: the most anomalous images of a run on one static page, for the person who inspects them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from PIL import Image

from stpm import storage
from stpm.data.encode import encode_jpeg
from stpm.data.heatmaps import read_overlay
from stpm.method.false_discovery import Discoveries
from stpm.method.preprocessing import Preprocessing
from stpm.models.record import ModelRecord
from stpm.pages import jpeg_uri, render, view_scores
from stpm.scoring.output import RunOutput
from stpm.scoring.ranked_rows import most_anomalous
from stpm.scoring.row_summary import RowSummary

# Maximum pixels of a picture's shorter and longer side.
_MAX_SHORT_SIDE, _MAX_LONG_SIDE = 256, 1024
# Pictures that are drawn at the same time.
THREADS = 8

log = logging.getLogger(__name__)


def write_triage(
    output: RunOutput,
    summary: RowSummary,
    max_images: int,
    models: Mapping[str, ModelRecord],
    discoveries: Discoveries | None = None,
) -> None:
    """Write the page, with its pictures embedded, to the state folder of a run that has scored all images.

    It takes a summary of all rows, each category's model, and the discoveries, if the run looks for them.
    """
    rows = most_anomalous(output, max_images, summary)
    cut_off = discoveries.cut_off if discoveries else 0.0
    pictures = storage.in_parallel(
        lambda row: picture(output, row, models[row["category"]].preprocessing), rows, THREADS
    )
    shown = [
        row | {"picture": drawn, "views": view_scores(row), "is_discovery": row["p_value"] <= cut_off}
        for row, drawn in zip(rows, pictures, strict=True)
    ]
    page = render("scoring/triage.html", rows=shown, folder=output.folder, discoveries=discoveries, models=models)
    storage.publish(output.triage, page.encode())


def picture(output: RunOutput, row: Mapping[str, Any], preprocessing: Preprocessing) -> str:
    """Draw an image with its heatmap, if there is one, as a data URI; return "" if the image cannot be read."""
    try:
        pixels, overlaid = read_overlay(row, output.folder, preprocessing, _MAX_SHORT_SIDE, _MAX_LONG_SIDE)
        return jpeg_uri(encode_jpeg(Image.fromarray(pixels if overlaid is None else overlaid)))
    except Exception as error:  # noqa: BLE001
        log.warning("%s is not shown: %s: %s", row["uri"], type(error).__name__, error)
        return ""
