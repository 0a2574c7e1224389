"""The chain of stages: manifest → decode (CPU tasks) → teacher and students (actors) → PNG (CPU tasks) → Parquet."""

from __future__ import annotations

import math
import sys
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
from stpm.cluster import KEEPING_MEMORY, Resources, is_shared, working_nodes
from stpm.errors import ConfigError
from stpm.images import View
from stpm.models import ModelStore
from stpm.options import option
from stpm.scoring.blocks import ManifestBlocks
from stpm.scoring.decode import IMAGE_SECONDS, Decode
from stpm.scoring.heatmaps import WriteHeatmaps
from stpm.scoring.ledger import Effort
from stpm.scoring.manifest import BLOCK_ROWS, Shard
from stpm.scoring.progress import Progress, followed
from stpm.scoring.scorer import FIRST_BATCH, LARGEST_BATCH, Scorer
from stpm.scoring.target import Target

STAGE_CPUS = 0.15
# As one task with reading, which Ray makes of them where they ask for the same, scoring was a third slower.
_DECODE_CPUS = 0.16
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
    """The actors that score: how many, how many there may be when nodes come, and what each takes of its node."""

    size: int
    most: int
    num_cpus: float
    num_gpus: float

    @classmethod
    def of(cls, scorers: int, nodes: Sequence[Resources], blocks: int, *, grows: bool) -> ScorerPool:
        """The pool for a cluster and a number of blocks to score.

        Args:
            scorers: as many as are wanted; 0: one per GPU, or without GPUs one per CPU core.
            nodes: what each node has, of those that take work.
            blocks: that there are to score.
            grows: nodes may come while it runs.

        Raises:
            ConfigError: if the wanted scorers do not fit.
        """
        cpus, gpus = (sum(int(node.get(kind, 0)) for node in nodes) for kind in ("CPU", "GPU"))
        fits = gpus or cpus
        if not fits:
            raise ConfigError("the cluster has no node with a CPU; scoring needs one")
        if scorers > fits and not grows:
            raise ConfigError(f"{scorers} scorers do not fit {fits} {'GPUs' if gpus else 'CPU cores'}; lower --scorers")
        size = min(scorers or fits, fits, max(blocks, 1))
        most = max(scorers or blocks, size) if grows else size
        return cls(size, most, _share(nodes, bool(gpus)), 1.0 if gpus else 0.0)


def _share(nodes: Sequence[Resources], gpus: bool) -> float:
    """CPUs that a scorer takes, so that one goes to each GPU or core and the other stages find room beside them.

    On a CPU each computes in one thread: an actor per core beats fewer with more threads.
    """
    if gpus:
        return min(1.0, *((node["CPU"] - STAGE_CPUS) / node["GPU"] for node in nodes if node.get("GPU", 0) > 0))
    most = max(int(node["CPU"]) for node in nodes)
    # Just so much that no node has room for one more than it has cores.
    return min(math.floor(100 * most / (most + 1) + 1), 99) / 100


def planned(options: ScoreOptions, node: Resources) -> str:
    """What would score on a node of the connected cluster, and how much could be prepared beside it, in words."""
    pool = ScorerPool.of(options.scorers, working_nodes(), sys.maxsize, grows=is_shared())
    cpus = node.get("CPU", 0)
    here = min(pool.size, int(node.get("GPU", 0)) if pool.num_gpus else int(cpus))
    scorers = f"{here} scorers of {pool.num_cpus:g} CPU{', 1 GPU' if pool.num_gpus else ''}; " if here else ""
    beside = int((cpus - here * pool.num_cpus) / STAGE_CPUS)
    return f"{scorers}{beside} tasks that fetch, decode and write" if cpus else ""


def score_shards(
    shards: Sequence[Shard],
    views: Mapping[str, View],
    store: ModelStore,
    options: ScoreOptions,
    target: Target,
    progress: Progress,
) -> Effort:
    """Score every row of some manifest shards and write one output row each. Needs a connection to Ray.

    Args:
        shards: of schema MANIFEST, with the user's own columns.
        views: what each category's model sees; rows of any other category become rows with an error.
        store: the models.
        options: how.
        target: where to.
        progress: told how far it is.

    Returns:
        What it took, from the first image on; `seconds` is not filled in.

    Raises:
        ConfigError: if the scorers do not fit the cluster.
    """
    blocks = ManifestBlocks(shards)
    nodes = working_nodes()
    pool = ScorerPool.of(options.scorers, nodes, len(blocks), grows=is_shared())
    overlays = views if target.overlays else {}
    out_filesystem, out_path = storage.arrow_filesystem(target.scores)
    pictures = f"heatmaps/{target.name}"
    with _checkpointed(target), followed(progress) as report:
        write = WriteHeatmaps(target.out, pictures, target.heatmaps, overlays, target.heatmaps_in, report)
        of_each = write.partitioned if target.partition_by == "category" else write.__call__
        (
            ray.data.read_datasource(blocks, override_num_blocks=len(blocks), num_cpus=STAGE_CPUS)
            .map_batches(
                Decode(views, options.image_seconds, report=report).__call__,
                batch_format="pyarrow",
                batch_size=_STAGE_ROWS,
                num_cpus=_DECODE_CPUS,
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
                compute=ActorPoolStrategy(min_size=pool.size, max_size=pool.most),
                batch_format="pyarrow",
                batch_size=LARGEST_BATCH if pool.num_gpus else FIRST_BATCH,
                num_cpus=pool.num_cpus,
                num_gpus=pool.num_gpus,
                runtime_env=KEEPING_MEMORY,
            )
            .map_batches(
                of_each,
                batch_format="pyarrow",
                batch_size=_STAGE_ROWS,
                num_cpus=STAGE_CPUS,
            )
            .write_parquet(
                out_path,
                filesystem=out_filesystem,
                partition_cols=["category"] if target.partition_by == "category" else None,
                filename_provider=FilenameProvider(target.name, "parquet"),
                min_rows_per_file=min(options.rows_per_file, BLOCK_ROWS) if target.raw_maps else options.rows_per_file,
                ray_remote_args={"num_cpus": STAGE_CPUS},
            )
        )
        done = report.total()
        return Effort(
            images=sum(rows for _, rows in shards),
            steady_images_per_second=round(report.speed(), 3),
            decode_seconds=round(done.decode_seconds, 3),
            forward_seconds=round(done.forward_seconds, 3),
            encode_seconds=round(done.encode_seconds, 3),
            device="gpu" if pool.num_gpus else "cpu",
            cpus=sum(node["CPU"] for node in nodes),
            gpus=sum(node.get("GPU", 0.0) for node in nodes),
        )


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
