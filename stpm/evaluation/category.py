"""One category's labelled scores, masks and anomaly maps, from the files of a scored run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from stpm.data.heatmaps import resize_map
from stpm.data.masks import crop_mask, read_mask
from stpm.errors import RunDamagedError, UndefinedMetricError
from stpm.evaluation.options import MasksAt
from stpm.method.preprocessing import Preprocessing
from stpm.metrics.category_metrics import LabelledScores, MaskedMap, ScoredImage, label_scores
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import naming_damaged_file, open_rows, read_batches

# The columns that `read_mask` takes, in its order.
MASK_COLUMNS = ("uri", "label", "mask", "width", "height")
_COLUMNS = (*MASK_COLUMNS, "score", "threshold", "is_anomalous", "error_kind", "error_message")
# They have a value in each row without an error.
_VALUES = ("score", "threshold", "is_anomalous", "width", "height")
# Images at a time. A map at original size may have a hundred times as many pixels.
_BATCH_SIZE = {"model": 16, "original": 1}


@dataclass(frozen=True)
class ScoredCategory:
    """One category of a scored run, with its model's preprocessing."""

    output: RunOutput
    name: str
    preprocessing: Preprocessing

    def rows(self, columns: Sequence[str] = _COLUMNS) -> pa.Table:
        """Read the category's rows, sorted by URI."""
        with naming_damaged_file(self.output):
            rows = open_rows(self.output, columns).to_table(
                columns=list(columns), filter=ds.field("category") == self.name
            )
        return rows.sort_by("uri")


def read_scores(category: ScoredCategory, masks_at: MasksAt = "model") -> LabelledScores:
    """Read the scores of a category's labelled images, and count their pixels by score, which needs raw maps.

    At `model` size, masks are brought to it by nearest neighbour, as the paper's authors do. At `original` size, maps
    are brought linearly to that of the cropped image.

    Raises:
        RunDamagedError: if a file of rows is damaged, or a row without an error lacks a value or has a wrong map.
    """
    every = category.rows(("uri", "label", "mask"))
    columns = [*_COLUMNS, "anomaly_map"] if pc.any(pc.not_equal(every["mask"], "")).as_py() else [*_COLUMNS]
    labelled = (ds.field("category") == category.name) & (ds.field("label") != "")
    batches = read_batches(category.output, columns, labelled, _BATCH_SIZE[masks_at])
    images = (_scored_image(category, row, masks_at) for batch in batches for row in batch.to_pylist())
    unlabelled_count = pc.sum(pc.equal(every["label"], "")).as_py() or 0
    return label_scores(images, _BATCH_SIZE[masks_at], unlabelled_count)


def _scored_image(
    category: ScoredCategory, row: Mapping[str, Any], masks_at: MasksAt
) -> tuple[ScoredImage, Callable[[], MaskedMap]]:
    error = row["error_kind"] and f"{row['uri']}: {row['error_kind']}: {row['error_message']}"
    if not error and (missing := [name for name in _VALUES if row[name] is None]):
        raise RunDamagedError(
            f"{category.output.scores}: the row of {row['uri']} has neither an error nor a {missing[0]}"
        )
    image = ScoredImage(**{name: row[name] for name in ScoredImage._fields if name != "error"}, error=error)
    return image, partial(_masked_map, category, row, masks_at)


def _masked_map(category: ScoredCategory, row: Mapping[str, Any], masks_at: MasksAt) -> MaskedMap:
    """Bring an image's map, float32 as bytes, and its mask to one size."""
    if row.get("anomaly_map") is None:
        raise UndefinedMetricError("no anomaly maps; score with --raw-maps")
    preprocessing = category.preprocessing
    mask = read_mask(*(row[name] for name in MASK_COLUMNS))
    try:
        shape = preprocessing.content_shape(row["width"], row["height"])
        anomaly_map = np.frombuffer(row["anomaly_map"], np.float32).reshape(shape)
    except (ValueError, ArithmeticError) as error:
        raise RunDamagedError(
            f"{category.output.scores}: the anomaly map of {row['uri']} is not of its image's size ({error})"
        ) from error
    if masks_at == "model":
        return MaskedMap.at_model_size(row["label"], anomaly_map, mask, row["mask"], preprocessing)
    cropped = crop_mask(mask, preprocessing)
    return MaskedMap(row["label"], resize_map(anomaly_map, *cropped.shape), cropped)
