"""One category's labelled scores, masks and anomaly maps, from the files of a scored run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from stpm.data.heatmaps import resize_map
from stpm.data.masks import crop_mask, read_mask
from stpm.data.mvtec import GOOD
from stpm.errors import DataError, RunDamagedError, UndefinedMetricError
from stpm.evaluation.options import MasksAt
from stpm.method.preprocessing import Preprocessing
from stpm.metrics.category_metrics import LabelledPixels, LabelledScores, MaskedMap, require_masks
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
    every = category.rows()
    rows = every.filter(pc.not_equal(every["label"], ""))
    is_scored = pc.equal(rows["error_kind"], "")
    scored, failed = rows.filter(is_scored), rows.filter(pc.invert(is_scored))
    for name in _VALUES:
        if scored[name].null_count:
            uri = scored.filter(pc.is_null(scored[name]))["uri"][0]
            raise RunDamagedError(f"{category.output.scores}: the row of {uri} has neither an error nor a {name}")
    problems = [f"{r['uri']}: {r['error_kind']}: {r['error_message']}" for r in failed.to_pylist()]
    pixels, no_pixels = LabelledPixels(), ""
    try:
        pixels = _count_pixels(category, scored, masks_at)
    except RunDamagedError:
        raise
    except (UndefinedMetricError, DataError) as error:
        no_pixels = str(error)
        problems += [no_pixels] if isinstance(error, DataError) else []
    return LabelledScores(
        labels=np.array(scored["label"].to_pylist(), np.str_),
        scores=scored["score"].to_numpy().astype(np.float32),
        is_anomalous=np.array(scored["is_anomalous"].to_pylist(), bool),
        threshold=scored["threshold"][0].as_py() if scored.num_rows else np.nan,
        pixels=pixels.counts,
        no_pixels=no_pixels,
        error_count=failed.num_rows,
        unlabelled_count=every.num_rows - rows.num_rows,
        vanished_masks=tuple(pixels.vanished),
        problems=tuple(problems),
    )


def _count_pixels(category: ScoredCategory, scored: pa.Table, masks_at: MasksAt) -> LabelledPixels:
    """Count pixels by label, with a few maps in memory at a time."""
    by_uri = {row["uri"]: row for row in scored.to_pylist()}
    require_masks({uri: row["mask"] for uri, row in by_uri.items() if row["label"] != GOOD})
    chosen = (ds.field("category") == category.name) & (ds.field("error_kind") == "") & (ds.field("label") != "")
    pixels = LabelledPixels()
    for batch in read_batches(category.output, ["uri", "anomaly_map"], chosen, _BATCH_SIZE[masks_at]):
        pixels.add(
            _masked_map(category, data, by_uri[uri], masks_at)
            for uri, data in zip(*batch.to_pydict().values(), strict=True)
        )
    return pixels


def _masked_map(category: ScoredCategory, data: bytes | None, row: Mapping[str, Any], masks_at: MasksAt) -> MaskedMap:
    """Bring an image's map, float32 as bytes, and its mask to one size."""
    if data is None:
        raise UndefinedMetricError("no anomaly maps; score with --raw-maps")
    preprocessing = category.preprocessing
    mask = read_mask(*(row[name] for name in MASK_COLUMNS))
    try:
        shape = preprocessing.content_shape(row["width"], row["height"])
        anomaly_map = np.frombuffer(data, np.float32).reshape(shape)
    except (ValueError, ArithmeticError) as error:
        raise RunDamagedError(
            f"{category.output.scores}: the anomaly map of {row['uri']} is not of its image's size ({error})"
        ) from error
    if masks_at == "model":
        return MaskedMap.at_model_size(row["label"], anomaly_map, mask, row["mask"], preprocessing)
    cropped = crop_mask(mask, preprocessing)
    return MaskedMap(row["label"], resize_map(anomaly_map, *cropped.shape), cropped)
