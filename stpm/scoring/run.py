"""Score a collection: the score job."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import pyarrow.compute as pc
import pyarrow.dataset as ds

from stpm import storage
from stpm.calibration import shortfall
from stpm.cluster import connected
from stpm.console import NOTHING_DONE, Say, exit_code
from stpm.errors import ConfigError, DataError, ModelError
from stpm.models import ModelStore
from stpm.options import option
from stpm.scoring.manifest import of_folder
from stpm.scoring.pipeline import ScoreOptions, Target, score_manifest


@dataclass(frozen=True)
class CollectionOptions:
    """What is scored, with which model, and where the results go."""

    models: str = option("", "model store: a folder or a URI")
    images: str = option("", "images to score: a folder or a URI, searched at any depth")
    out: str = option("", "run folder for scores/*.parquet and heatmaps/: a folder or a URI")
    category: str = option("", "category of the images: the model that scores them")
    heatmaps: Literal["all", "none"] = option("all", "images that get a heatmap and an overlay, as PNG")
    raw_maps: bool = option(False, "keep each anomaly map as float32 in the Parquet files")

    def __post_init__(self) -> None:
        for name in ("models", "images", "out", "category"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing")


def run_score(collection: CollectionOptions, options: ScoreOptions, say: Say) -> int:
    """The score job. Returns its exit code: 0 all scored, 2 some images could not be, 3 none could.

    Raises:
        ConfigError: if the options cannot be run.
    """
    target = Target(storage.absolute(collection.out), "scores", collection.heatmaps == "all", collection.raw_maps)
    store = ModelStore(collection.models)
    try:
        record = store.record(collection.category)
        manifest = of_folder(storage.absolute(collection.images), collection.category)
    except (ModelError, DataError) as error:
        say(f"error: {error}")
        return NOTHING_DONE
    if warning := shortfall({collection.category: record.fit.calibration_count}, options.false_alarm_rate):
        say(warning)
    say(f"{manifest.num_rows} images under {collection.images}, scored by {record.model_id}")
    start = time.perf_counter()
    with connected():
        score_manifest(manifest, store, options, target)
    seconds = time.perf_counter() - start
    return _tell(target, manifest.num_rows, seconds, say)


def _tell(target: Target, images: int, seconds: float, say: Say) -> int:
    filesystem, path = storage.arrow_filesystem(target.scores)
    rows = ds.dataset(path, filesystem=filesystem).to_table(
        columns=["uri", "is_anomalous", "error_kind", "error_message"]
    )
    failed = rows.filter(pc.not_equal(rows["error_kind"], ""))
    for row in failed.slice(0, 10).to_pylist():
        say(f"{row['uri']}: {row['error_kind']}: {row['error_message']}")
    anomalous = pc.sum(rows["is_anomalous"]).as_py() or 0
    say(
        f"{rows.num_rows} rows in {target.scores}: {anomalous} anomalous, {failed.num_rows} with an error; "
        f"{seconds:.0f} s, {images / seconds:.0f} images/s with Ray's start"
    )
    return exit_code(rows.num_rows - failed.num_rows, failed.num_rows)
