"""Read the most anomalous rows of a run."""

from __future__ import annotations

import heapq
from collections import defaultdict
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from stpm import storage
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import naming_damaged_file, open_rows, read_batches

_VIEW_SCORES = ["fine_score", "coarse_score"]
_MARGIN = ["score", *_VIEW_SCORES, "threshold"]
_PLACE = ["region_count", "regions", "peak_x", "peak_y", "peak_features", "heatmap", "heatmap_png"]
_IMAGE = ["image_id", "uri", "archive_start", "archive_length", "category", "width", "height", "roi"]
_COLUMNS = [*_IMAGE, "model_id", *_MARGIN, "p_value", "is_anomalous", *_PLACE]
# The name that pyarrow gives to the file of a row.
_FILE = "__filename"
# Thresholds are at least this in the division by them.
_MIN_THRESHOLD = 1e-30


def most_anomalous(output: RunOutput, max_images: int) -> list[dict[str, Any]]:
    """Read the most anomalous rows, in order: those whose score is farthest above its threshold.

    Each gets that as a key `margin`. Of all rows only the scores are read; of those with pictures, a few row groups.

    Raises:
        RunDamagedError: if a file cannot be read.
    """
    # Margin, id (which breaks ties) and file of the images that rank first.
    ranked: list[tuple[float, int, str]] = []
    for batch in read_batches(output, ["image_id", *_MARGIN, _FILE], ds.field("score").is_valid()):
        margins, ids = _margins(batch), batch["image_id"].to_numpy()
        first = np.lexsort((ids, margins))[::-1][:max_images]
        found = zip(margins[first].tolist(), ids[first].tolist(), batch[_FILE].take(first).to_pylist(), strict=True)
        ranked = heapq.nlargest(max_images, [*ranked, *found])
    wanted: defaultdict[str, list[int]] = defaultdict(list)
    for _, image_id, path in ranked:
        wanted[storage.join(output.scores, PurePosixPath(path).name)].append(image_id)
    rows: dict[int, dict[str, Any]] = {}
    for uri, ids_in_file in wanted.items():
        is_wanted = ds.field("image_id").isin(ids_in_file)
        with naming_damaged_file(output, [uri]):
            dataset = open_rows(output, _COLUMNS, [uri])
            # Whole row groups, and only those with a wanted image: rows may contain large pictures.
            for group in (group for file in dataset.get_fragments() for group in file.split_by_row_group()):
                if group.count_rows(filter=is_wanted):
                    table = group.to_table(dataset.schema, columns=_COLUMNS, filter=is_wanted)
                    rows |= {row["image_id"]: row for row in table.to_pylist()}
    return [rows[image_id] | {"margin": margin} for margin, image_id, _ in ranked]


def _margins(scored: pa.RecordBatch) -> npt.NDArray[np.float64]:
    """Compute how far scores are above their thresholds, comparable over models.

    Take the difference where the score has a view's: its scale is that of quantiles, the same in all models. Otherwise
    divide the difference by the threshold.
    """
    scores, thresholds = (scored[name].cast(pa.float64()).to_numpy() for name in ("score", "threshold"))
    has_scale = np.any([scored[name].is_valid().to_numpy(zero_copy_only=False) for name in _VIEW_SCORES], axis=0)
    scales = np.where(has_scale, 1.0, np.maximum(np.abs(thresholds), _MIN_THRESHOLD))
    above: npt.NDArray[np.float64] = (scores - thresholds) / scales
    return above
