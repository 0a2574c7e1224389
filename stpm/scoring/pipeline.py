"""The chain of stages: manifest → decode (CPU tasks) → teacher and students (actors) → PNG (CPU tasks) → Parquet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig, CheckpointManager
from ray.data.datasource import FilenameProvider

from stpm import storage
from stpm.calibration import check_rate
from stpm.cluster import KEEPING_MEMORY
from stpm.errors import ConfigError
from stpm.images import View
from stpm.models import ModelStore
from stpm.options import option
from stpm.scoring.decode import IMAGE_SECONDS, Decode
from stpm.scoring.heatmaps import WriteHeatmaps
from stpm.scoring.progress import Done, Progress, followed
from stpm.scoring.scorer import FIRST_BATCH, LARGEST_BATCH, Scorer
from stpm.scoring.target import Target

# Ray's read and repartition tasks ask for a whole CPU each: if the actors took all, nothing would ever move.
_SPARE_CPUS = 1
STAGE_CPUS = 0.25
_BLOCK_ROWS = 64
_STAGE_ROWS = 16


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
    model_memory_gib: float = option(1.0, "GiB of students that a scorer keeps loaded, those used last")
    image_seconds: float = option(
        IMAGE_SECONDS, "seconds that fetching and decoding one image may take; beyond them it is a row with an error"
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


@dataclass(frozen=True)
class ScorerPool:
    """The actors that score: how many, and what each takes of its node."""

    size: int
    num_cpus: float
    num_gpus: float

    @classmethod
    def of(cls, scorers: int, resources: dict[str, float], blocks: int) -> ScorerPool:
        """The pool for a cluster and a number of blocks to score.

        Raises:
            ConfigError: if the wanted scorers do not fit.
        """
        cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        if cpus <= _SPARE_CPUS:
            raise ConfigError(f"the cluster has {cpus} CPUs; scoring needs {_SPARE_CPUS} beside one for the scorers")
        most = gpus or cpus
        if scorers > most:
            raise ConfigError(f"{scorers} scorers do not fit {most} {'GPUs' if gpus else 'CPU cores'}; lower --scorers")
        size = min(scorers or most, max(blocks, 1))
        # One thread each: on a CPU one actor per core beats fewer with more threads.
        share = (cpus - _SPARE_CPUS) / max(size, cpus)
        return cls(size, share, 1.0 if gpus else 0.0)


def score_shards(
    shards: Sequence[str],
    rows: int,
    views: Mapping[str, View],
    store: ModelStore,
    options: ScoreOptions,
    target: Target,
    progress: Progress,
) -> tuple[Done, float]:
    """Score every row of some manifest shards and write one output row each. Needs a connection to Ray.

    Args:
        shards: URIs of Parquet files of schema MANIFEST, with the user's own columns.
        rows: how many they hold.
        views: what each category's model sees; rows of any other category become rows with an error.
        store: the models.
        options: how.
        target: where to.
        progress: told how far it is.

    Returns:
        What the stages reported, and their steady speed in images per second.

    Raises:
        ConfigError: if the scorers do not fit the cluster.
    """
    pool = ScorerPool.of(options.scorers, ray.cluster_resources(), -(-rows // _BLOCK_ROWS))
    overlays = views if target.overlays else {}
    filesystem, _ = storage.arrow_filesystem(target.manifest)
    out_filesystem, out_path = storage.arrow_filesystem(target.scores)
    pictures = f"heatmaps/{target.name}"
    with _checkpointed(target), followed(progress) as report:
        write = WriteHeatmaps(target.out, pictures, target.heatmaps, overlays, target.heatmaps_in, report)
        (
            ray.data.read_parquet(
                [storage.arrow_filesystem(uri)[1] for uri in shards], filesystem=filesystem, num_cpus=STAGE_CPUS
            )
            .repartition(target_num_rows_per_block=_BLOCK_ROWS)
            .map_batches(
                Decode(views, options.image_seconds).__call__,
                batch_format="pyarrow",
                batch_size=_STAGE_ROWS,
                num_cpus=STAGE_CPUS,
            )
            .map_batches(
                Scorer,
                fn_constructor_args=(
                    store.uri,
                    options.false_alarm_rate,
                    target.raw_maps,
                    options.batch_size,
                    int(options.model_memory_gib * 2**30),
                    0,
                    report,
                ),
                compute=ActorPoolStrategy(size=pool.size),
                batch_format="pyarrow",
                batch_size=LARGEST_BATCH if pool.num_gpus else FIRST_BATCH,
                num_cpus=pool.num_cpus,
                num_gpus=pool.num_gpus,
                runtime_env=KEEPING_MEMORY,
            )
            .map_batches(
                write.__call__,
                batch_format="pyarrow",
                batch_size=_STAGE_ROWS,
                num_cpus=STAGE_CPUS,
            )
            .write_parquet(
                out_path,
                filesystem=out_filesystem,
                filename_provider=FilenameProvider(target.name, "parquet"),
                min_rows_per_file=min(options.rows_per_file, _BLOCK_ROWS) if target.raw_maps else options.rows_per_file,
                ray_remote_args={"num_cpus": STAGE_CPUS},
            )
        )
        return report.total(), report.speed()


@contextmanager
def _checkpointed(target: Target) -> Iterator[None]:
    """Data sets made in the block write down the ids of the rows that they have written."""
    context = DataContext.get_current()
    filesystem, path = storage.arrow_filesystem(target.checkpoint)
    context.checkpoint_config = CheckpointConfig(
        id_column="image_id",
        checkpoint_path=path,
        override_filesystem=filesystem,
        delete_checkpoint_on_success=False,
        checkpoint_manager_cls=_CleaningManager,
    )
    try:
        yield
    finally:
        context.checkpoint_config = None


class _CleaningManager(CheckpointManager):  # type: ignore[misc]
    """Ray's clean-up of what writers left half done, without its filter: the rows that come in are those left."""

    def load_checkpoint(self, data_file_dir: Any = None, data_file_filesystem: Any = None) -> tuple[None, int]:
        if data_file_dir is not None:
            self._clean_pending_checkpoints(data_file_dir, data_file_filesystem)
        return None, 0
