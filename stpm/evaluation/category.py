"""One category's labelled scores, masks and anomaly maps, from the files of a scored run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from stpm import storage
from stpm.errors import DataError, ModelDamagedError, ModelError, RunDamagedError
from stpm.evaluation.options import MasksAt
from stpm.method.preprocessing import Preprocessing
from stpm.metrics.category_metrics import LabelledScores, ScoredImage, label_scores
from stpm.metrics.pixel_metrics import Map
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import naming_damaged_file, open_rows, read_batches

# The columns that `read_mask` takes, in its order.
MASK_COLUMNS = ("uri", "label", "mask", "width", "height")
_COLUMNS = (*MASK_COLUMNS, "score", "threshold", "is_anomalous", "error_kind", "error_message")
# Images at a time. A map at original size may have a hundred times as many pixels.
_BATCH_SIZE = {"model": 16, "original": 1}


@dataclass(frozen=True)
class ScoredCategory:
    """One category of a scored run, with its model's preprocessing."""

    output: RunOutput
    name: str
    preprocessing: Preprocessing

    def rows(self, columns: Sequence[str] = _COLUMNS, uris: Sequence[str] | None = None) -> pa.Table:
        """Read the category's rows, or those with some URIs, sorted by URI."""
        chosen = ds.field("category") == self.name
        chosen = chosen if uris is None else chosen & ds.field("uri").isin(uris)
        with naming_damaged_file(self.output):
            rows = open_rows(self.output, columns).to_table(columns=list(columns), filter=chosen)
        return rows.sort_by("uri")


def read_models(output: RunOutput, models: str) -> tuple[ModelStore, list[ModelRecord]]:
    """Read the records of the models that scored a run.

    Args:
        models: URI of the run's model store, or of the folder that has a store for each of several runs, by name; "":
            where the store was when the run began.

    Raises:
        DataError: if the run is not finished.
        ModelError: if one of the models no longer exists.
    """
    state = output.state
    uri, model_ids = state.store_and_model_ids()
    if not state.is_finished():
        raise DataError(f"{output.folder}: this run is not finished; run the score job again")
    if models:
        own = storage.join(models, output.name)
        uri = own if output.is_named and storage.exists(own) else models
    store = ModelStore(uri)
    try:
        return store, [store.record(category, model_id) for category, model_id in model_ids.items()]
    except ModelDamagedError as error:
        raise ModelError(f"{error}; if its store has moved, name the new place by --models") from error


def read_scores(category: ScoredCategory, masks_at: MasksAt = "model") -> LabelledScores:
    """Read the scores of a category's labelled images, and count their pixels by score, which needs raw maps.

    Raises:
        RunDamagedError: if a file of rows is damaged, or a row without an error lacks a value or has a wrong map.
    """
    every = category.rows(("uri", "label", "mask"))
    columns = [*_COLUMNS, "anomaly_map"] if pc.any(pc.not_equal(every["mask"], "")).as_py() else [*_COLUMNS]
    labelled = (ds.field("category") == category.name) & (ds.field("label") != "")
    batches = read_batches(category.output, columns, labelled, _BATCH_SIZE[masks_at])
    return label_scores(
        (_scored_image(category, row) for batch in batches for row in batch.to_pylist()),
        category.preprocessing,
        at_original_size=masks_at == "original",
        batch_size=_BATCH_SIZE[masks_at],
        unlabelled_count=pc.sum(pc.equal(every["label"], "")).as_py() or 0,
    )


def _scored_image(category: ScoredCategory, row: Mapping[str, Any]) -> tuple[ScoredImage, Map | None]:
    """Make an image and its map, which a row has as the bytes of float32."""
    error = row["error_kind"] and f"{row['uri']}: {row['error_kind']}: {row['error_message']}"
    image = ScoredImage(**{name: row[name] for name in ScoredImage._fields if name != "error"}, error=error)
    if error:
        return image, None
    if missing := [name for name in image._fields if getattr(image, name) is None]:
        raise RunDamagedError(
            f"{category.output.scores}: the row of {image.uri} has neither an error nor a {missing[0]}"
        )
    if (data := row.get("anomaly_map")) is None:
        return image, None
    try:
        return image, np.frombuffer(data, np.float32).reshape(
            category.preprocessing.content_shape(image.width, image.height)
        )
    except (ValueError, ArithmeticError) as error:
        raise RunDamagedError(
            f"{category.output.scores}: the anomaly map of {image.uri} is not of its image's size ({error})"
        ) from error
