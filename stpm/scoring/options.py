"""Options of scoring. Light: the command line needs them before anything that is heavy to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stpm.errors import ConfigError
from stpm.method.calibration import check_rate
from stpm.options import WAIT_HELP, Names, check_required, option
from stpm.scoring.inputs.category_rule import CategoryRule

Heatmaps = Literal["all", "anomalous", "none"]
HeatmapsIn = Literal["files", "parquet"]
PartitionBy = Literal["none", "category"]

IMAGE_SECONDS = 300.0


@dataclass(frozen=True)
class CollectionOptions:
    """What is scored, with which model, and where the results go.

    Raises:
        ConfigError: if something is missing, or cannot be.
    """

    models: str = option("", "model store: a folder or a URI", required=True)
    images: Names = option(
        Names(),
        "what to score, separated by commas: folders or prefixes (searched at any depth), globs, tar archives, "
        "manifests (.parquet, .csv or .jsonl with a column `uri`; others are carried to the output), .parquet files "
        "with the images themselves in a column `image` or `bytes`, or - for a URI per line on standard input. What "
        "exists by a name is no glob; write [[], [*] and [?] for the characters themselves",
        required=True,
    )
    out: str = option("", "run folder for scores/*.parquet, heatmaps/ and run.json: a folder or a URI", required=True)
    category: str = option("", "category of every image: the model that scores it")
    category_from: str = option(
        "", "the category of an image from the last parts of its path, such as {category}/{date}/{name}"
    )
    allow: Names = option(
        Names(),
        "prefixes that the URIs of a manifest may have, separated by commas; none: the manifest's own bucket or folder",
    )
    heatmaps: Heatmaps = option("all", "images that get a heatmap, as palette PNG: all, anomalous or none")
    heatmaps_in: HeatmapsIn = option(
        "files",
        "where the pictures go: a PNG file each, or bytes in columns of the Parquet files, for millions of images",
    )
    partition_by: PartitionBy = option(
        "none", "category: the Parquet files of each category in a folder of their own, scores/category=<name>/"
    )
    overlay: bool = option(False, "write beside each heatmap the image with it over it, in the image's own proportions")
    raw_maps: bool = option(False, "keep each anomaly map as float32 in the Parquet files")
    top: int = option(50, "images on triage.html, the page of the most anomalous ones; 0: no page")
    dry_run: bool = option(
        False, "list everything, score 200 images of it, and say what the whole would take; nothing is left behind"
    )
    fresh: bool = option(False, "remove what earlier runs left in the run folder, and start over")
    wait: bool = option(False, WAIT_HELP)
    max_error_rate: float = option(0.01, "share of images, 0 to 1, that may be errors before the exit code is 2")

    def __post_init__(self) -> None:
        check_required(self)
        if not 0 <= self.max_error_rate <= 1:
            raise ConfigError(f"max-error-rate is {self.max_error_rate}; give a share between 0 and 1")
        if self.top < 0:
            raise ConfigError(f"top is {self.top}; give 0 or more")
        CategoryRule(self.category, self.category_from)


@dataclass(frozen=True)
class ScoreOptions:
    """How images are scored.

    Raises:
        ConfigError: if a value cannot be.
    """

    false_alarm_rate: float = option(
        0.01,
        "share of good images that may be called anomalous, 0 to 1; sets the threshold from held-out normals",
    )
    batch_size: int = option(
        0,
        "images per forward pass; 0: 16 on a CPU, and on a GPU doubled while that is faster. Halved where memory runs "
        "out",
    )
    model_memory_gib: float = option(1.0, "GiB of models that a scorer keeps loaded, those used last")
    image_seconds: float = option(
        IMAGE_SECONDS,
        "seconds that fetching and decoding one image may take; one that is not fetched by then is left to the next "
        "run, one that is not decoded is a row with an error",
    )
    accept_errors: bool = option(
        False,
        "write a row with an error for each image that storage, a model or a device failed, instead of leaving it to "
        "the next run; and never stop because too many fail",
    )
    scorers: int = option(0, "actors that score; 0: one per GPU, or without GPUs one per CPU core")
    rows_per_file: int = option(
        512, "rows of a Parquet file, at least; what a kill costs at most, for each task that writes"
    )

    def __post_init__(self) -> None:
        check_rate(self.false_alarm_rate)
        for name, least in (("batch_size", 0), ("rows_per_file", 1), ("model_memory_gib", 0)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name.replace('_', '-')} is {getattr(self, name)}; give at least {least}")
        if not self.image_seconds > 0:
            raise ConfigError(f"image-seconds is {self.image_seconds}; give more than 0")
        if self.scorers < 0:
            raise ConfigError(f"scorers is {self.scorers}; give 1 or more, or 0 to take what the cluster has")
