"""Options of fitting. Light: the command line needs them before anything that is heavy to import."""

from __future__ import annotations

from dataclasses import dataclass

from stpm.errors import ConfigError
from stpm.method.calibration import check_false_alarm_rate
from stpm.options import WAIT_HELP, Names, check_required, option


@dataclass(frozen=True)
class FitOptions:
    """Where the images are and where the models go.

    Raises:
        ConfigError: if something is missing, or cannot be.
    """

    data: str = option("", "data set in the MVTec AD layout: a folder or a URI (s3://, gs://, abfs://)", required=True)
    models: str = option("", "model store that the models go to: a folder or a URI", required=True)
    categories: Names = option(Names(), "categories to take, separated by commas; none: all that the data set has")
    false_alarm_rate: float = option(
        0.01,
        "share of good images that scoring may call anomalous, 0 to 1; it shapes no model, but fitting warns where "
        "the held-out normals are too few for it",
    )
    wait: bool = option(False, WAIT_HELP)

    def __post_init__(self) -> None:
        check_required(self)
        check_false_alarm_rate(self.false_alarm_rate)


@dataclass(frozen=True)
class PoolOptions:
    """The workers that fit.

    Raises:
        ConfigError: if a value is below what makes sense.
    """

    workers: int = option(0, "workers that fit in parallel; 0: one per GPU, or without GPUs one per CPU core")
    gpus_per_worker: float = option(1.0, "share of a GPU that a worker takes, where the cluster has GPUs; 0: use CPUs")
    cpus_per_worker: int = option(
        0,
        "CPU cores, and so threads, that a worker takes; 0: as many as leave a worker for each category, or for each "
        "share of a GPU, and at most 8",
    )
    memory_gib: float = option(
        0.0,
        "GiB that a worker may take for decoded images (beyond it they go to a file), for the teacher's features and "
        "for distance maps in calibration (beyond it they are computed anew); 0: its share of half the node's memory",
    )
    checkpoint_seconds: float = option(
        30.0, "seconds between checkpoints of a fit, at the end of an epoch; 0: every epoch"
    )
    resize_seconds: float = option(
        60.0,
        "seconds between looks for nodes that came to the cluster; taking one in starts all workers anew, from their "
        "checkpoints",
    )
    tensorboard: str = option(
        "", "local folder for TensorBoard's event files, one run per seed and category; none: not written"
    )

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"workers is {self.workers}; give 1 or more, or 0 to take what the cluster has")
        if self.cpus_per_worker < 0:
            raise ConfigError(
                f"cpus-per-worker is {self.cpus_per_worker}; give at least 1, or 0 to share what there is"
            )
        if self.gpus_per_worker < 0:
            raise ConfigError(f"gpus-per-worker is {self.gpus_per_worker}; give 0 or more")
        if self.memory_gib < 0:
            raise ConfigError(f"memory-gib is {self.memory_gib}; give a number above 0, or 0 for the worker's share")
        if self.checkpoint_seconds < 0:
            raise ConfigError(f"checkpoint-seconds is {self.checkpoint_seconds}; give 0 or more")
        if not self.resize_seconds > 0:
            raise ConfigError(f"resize-seconds is {self.resize_seconds}; give more than 0")
