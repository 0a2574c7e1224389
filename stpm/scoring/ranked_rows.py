"""Read the most anomalous rows of a run, which the summaries of its rows rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pyarrow.dataset as ds

from stpm.errors import RunDamagedError
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import naming_damaged_file, open_rows
from stpm.scoring.row_summary import COLUMNS, VIEW_SCORES, RankedImage, RowSummary, task_of
from stpm.scoring.written_rows import committed_summaries

_HEATMAP = ["heatmap", "heatmap_png"]
_VALUES = ["score", *VIEW_SCORES, "threshold", "p_value", "is_anomalous", "region_count", "regions", "peak_x", "peak_y"]
_IMAGE = ["image_id", "uri", "archive_start", "archive_length", "category", "width", "height", "roi"]
_COLUMNS = [*_IMAGE, "model_id", *_VALUES, "peak_features", *_HEATMAP]


def most_anomalous(output: RunOutput, max_images: int, summary: RowSummary | None = None) -> list[dict[str, Any]]:
    """Read the most anomalous rows, in order; each gets a key `margin`, see `RankedImage`.

    Take those that a summary of all rows ranks first: the sum of those of committed segments, if none is given. Scan
    all rows if it ranks too few.

    Raises:
        RunDamagedError: if one of them is missing, or cannot be read.
    """
    summary = summary or RowSummary.total(committed_summaries(output), max_images)
    if not summary.rows or summary.max_ranked < max_images:
        # No row is written yet, or the run was scored for a shorter page.
        summary = scan_rows(output, max_images)
    return _read_images(output, summary.ranked)


def scan_rows(output: RunOutput, max_ranked: int) -> RowSummary:
    """Summarize all rows that a run wrote by reading them, without their pictures. Raise RunDamagedError."""
    dataset = open_rows(output, COLUMNS)
    with naming_damaged_file(output):
        return RowSummary.total(
            (
                RowSummary.of_rows(file.to_table(dataset.schema, columns=COLUMNS), task_of(file.path), max_ranked)
                for file in dataset.get_fragments()
            ),
            max_ranked,
        )


def _read_images(output: RunOutput, images: Sequence[RankedImage]) -> list[dict[str, Any]]:
    """Read whole row groups, and only those that hold a wanted image: rows may contain large pictures."""
    wanted: defaultdict[str, list[int]] = defaultdict(list)
    for image in images:
        wanted[image.task].append(image.image_id)
    rows: dict[int, dict[str, Any]] = {}
    for uri in output.files():
        if not (ids := wanted.get(task_of(uri))):
            continue
        is_wanted = ds.field("image_id").isin(ids)
        with naming_damaged_file(output, [uri]):
            dataset = open_rows(output, _COLUMNS, [uri])
            for group in (group for file in dataset.get_fragments() for group in file.split_by_row_group()):
                if group.count_rows(filter=is_wanted):
                    found = group.to_table(dataset.schema, columns=_COLUMNS, filter=is_wanted)
                    rows |= {row["image_id"]: row for row in found.to_pylist()}
    if missing := sum(image.image_id not in rows for image in images):
        raise RunDamagedError(
            f"{missing} of the most anomalous images have no row in {output.scores}: files of it are missing"
        )
    return [rows[image.image_id] | {"margin": image.margin} for image in images]
