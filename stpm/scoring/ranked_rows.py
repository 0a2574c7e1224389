"""Read the most anomalous rows of a run, which the summaries of its rows rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.dataset as ds

from stpm.errors import RunDamagedError
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import naming_damaged_file, open_rows
from stpm.scoring.row_summary import COLUMNS, SCORE_PARTS, RankedImage, RowSummary, task_of
from stpm.scoring.written_rows import committed_summaries

_HEATMAP = ["heatmap", "heatmap_png"]
_VALUES = ["score", *SCORE_PARTS, "threshold", "p_value", "is_anomalous", "peak_x", "peak_y"]
_COLUMNS = ["image_id", "uri", "archive_start", "archive_length", "category", "model_id", *_VALUES, *_HEATMAP]


def most_anomalous(output: RunOutput, max_images: int) -> list[dict[str, Any]]:
    """Read the most anomalous rows, in order, as `read_ranked` does; each gets a key `margin`, see `RankedImage`."""
    return read_ranked(output, RowSummary.total(committed_summaries(output), max_images), max_images)


def read_ranked(output: RunOutput, summary: RowSummary, max_images: int) -> list[dict[str, Any]]:
    """Read the rows that a summary ranks first; if it ranks too few, scan all rows.

    Raises:
        RunDamagedError: if one of them is missing, or cannot be read.
    """
    if not summary.rows or summary.max_ranked < max_images:
        # No row is written yet, or the run was scored for a shorter page.
        summary = scan_rows(output, max_images)
    return _read_images(output, summary.ranked)


def scan_rows(output: RunOutput, max_ranked: int) -> RowSummary:
    """Summarize all rows that a run wrote by reading them, without their pictures, a file at a time.

    Raises:
        RunDamagedError: if a file is damaged, or has other columns.
    """
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
        if ids := wanted.get(task_of(uri)):
            with naming_damaged_file(output, [uri]):
                rows |= {row["image_id"]: row for row in _read_rows(output, uri, ids)}
    if missing := sum(image.image_id not in rows for image in images):
        raise RunDamagedError(
            f"{missing} of the most anomalous images have no row in {output.scores}: files of it are missing"
        )
    return [rows[image.image_id] | {"margin": image.margin} for image in images]


def _read_rows(output: RunOutput, uri: str, image_ids: Sequence[int]) -> Iterator[dict[str, Any]]:
    dataset = open_rows(output, _COLUMNS, [uri])
    is_wanted = ds.field("image_id").isin(image_ids)
    for file in dataset.get_fragments():
        for row_group in file.split_by_row_group():
            if row_group.count_rows(filter=is_wanted):
                yield from row_group.to_table(dataset.schema, columns=_COLUMNS, filter=is_wanted).to_pylist()
