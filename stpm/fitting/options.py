"""Options of fitting. They import nothing heavy: the command line reads them first."""

from __future__ import annotations

from dataclasses import dataclass

from stpm.errors import ConfigError
from stpm.method.recipe import Recipe
from stpm.options import CATEGORIES_HELP, EXCLUDE_HELP, ROI_HELP, TRACK_HELP, WAIT_HELP, Names, Options, flag, option


@dataclass(frozen=True)
class CategoryOptions(Options):
    """What holds for one category alone: a recipe of its own, and the options below.

    An entry of `categories:` in a --config file has these options, and those of the recipe but its seed.

    Args:
        file: which file says so; "" if none does.
    """

    category: str
    recipe: Recipe
    file: str = ""
    threshold: float | None = option(
        None, "threshold that a new model begins with, decided by whoever wrote the file", minimum=-3e38, maximum=3e38
    )
    roi: str = option("", ROI_HELP)


@dataclass(frozen=True)
class FitOptions(Options):
    """The data set to fit on, and the store of the models."""

    data: str = option(
        "",
        "data set in the MVTec AD layout: a folder or a URI (s3://, gs://, abfs://); not needed with --add-good",
    )
    models: str = option("", "model store to write to: a folder or a URI", required=True)
    categories: Names = option(
        Names(), f"categories to fit, separated by commas; none: all categories of the data set{CATEGORIES_HELP}"
    )
    exclude: str = option("", EXCLUDE_HELP)
    roi: str = option("", ROI_HELP)
    false_alarm_rate: float = option(
        0.01,
        "fraction of good images that scoring may call anomalous, 0 to 1; it changes no model, but fitting warns where "
        "the held-out good images are too few for it, and --add-good compares thresholds at it",
        above=0,
        below=1,
    )
    add_good: str = option(
        "",
        "table of images (.parquet, .csv, .jsonl or .ndjson) with the columns uri, category and label, such as "
        "triage.html saves: images labelled good are added to the calibration of their category's current model",
    )
    allow: Names = option(
        Names(),
        "with --add-good: prefixes that the URIs in the table may have, instead of the table's own bucket or folder, "
        "separated by commas",
    )
    track: str = option("", TRACK_HELP)
    wait: bool = option(False, WAIT_HELP)
    by_category: tuple[CategoryOptions, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allow and not self.add_good:
            raise ConfigError("--allow is given without --add-good; give both")
        if self.add_good and (given := [flag(name) for name in ("exclude", "track") if getattr(self, name)]):
            raise ConfigError(f"{given[0]} is given with --add-good, which fits no model; leave one of them out")
        if not self.data and not self.add_good:
            raise ConfigError("--data is missing; see --help")


@dataclass(frozen=True)
class WorkerOptions(Options):
    """The workers that fit."""

    workers: int = option(
        0,
        "workers that fit in parallel, at most; 0: one per category and seed, but at most one per GPU (see "
        "--gpus-per-worker), or without GPUs one per CPU core",
        minimum=0,
    )
    gpus_per_worker: float = option(
        1.0, "GPUs per worker, such as 0.5, where the cluster has GPUs; 0: use CPUs", minimum=0
    )
    cpus_per_worker: int = option(
        0,
        "CPU cores per worker, with one thread each; 0: as many as the number of workers leaves to each, at most 8",
        minimum=0,
    )
    worker_ram_gib: float = option(
        0.0,
        "GiB of RAM per worker for decoded images (beyond it they go to a file), and for the teacher's features "
        "and calibration's distance maps (beyond it they are recomputed); 0: half of the node's RAM times the worker's "
        "share of its CPU cores",
        minimum=0,
    )
    checkpoint_seconds: float = option(
        30.0,
        "minimum seconds between checkpoints of a fit, which are made at the end of an epoch; 0: every epoch",
        minimum=0,
    )
    resize_seconds: float = option(
        60.0,
        "seconds between checks for new nodes in the cluster; to use one, all workers restart from their checkpoints",
        above=0,
    )
