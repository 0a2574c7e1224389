"""Calibrate a model on more images, without fitting it again."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa

from stpm.data.image_statistics import COMPARED
from stpm.feedback.new_images import NewImages
from stpm.method.scales import HeatmapScale
from stpm.models.libraries import installed_versions
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.times import timestamp


def recalibrate(store: ModelStore, new: NewImages) -> ModelRecord:
    """Add the scores of new images to the calibration of their category's current model; stage it as a new model.

    Keep the scales of the model's parts, so that no score changes, and the lower end of the heatmap scale. Its
    `good_max` rises to the largest pixel of the new images.

    Raises:
        ModelError: if a file of the current model is missing or damaged.
    """
    record, scale = new.record, new.record.heatmap_scale
    calibration = _add_scores(store.calibration_scores(record), new)
    changed = dataclasses.replace(
        record,
        heatmap_scale=HeatmapScale(scale.low, max([scale.good_max, *(result.peak for result in new.results)])),
        fit=dataclasses.replace(record.fit, calibration_count=len(calibration)),
        added_images=(*record.added_images, *new.images),
        library_versions=installed_versions(),
        created=timestamp(),
    )
    return store.save_recalibrated(record, changed, calibration, _add_statistics(store.image_statistics(record), new))


def _add_scores(calibration: pa.Table, new: NewImages) -> pa.Table:
    added = pa.table({"score": new.scores, "is_added": np.ones(len(new.images), bool)}, calibration.schema)
    return pa.concat_tables([calibration, added]).sort_by("score")


def _add_statistics(statistics: pa.Table, new: NewImages) -> pa.Table:
    columns = np.array([result.statistics for result in new.results], np.float32).T
    added = pa.table(dict(zip(COMPARED, columns, strict=True)), statistics.schema)
    return pa.concat_tables([statistics, added])
