"""The chain of stages: manifest → decode (CPU tasks) → teacher and students (actors) → PNG (CPU tasks) → Parquet."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.exceptions import SystemException
from ray.exceptions import RayError

from stpm import storage
from stpm.calibration import check_rate
from stpm.cluster import KEEPING_MEMORY, Resources, is_shared, working_nodes
from stpm.errors import ConfigError, CutOffError
from stpm.models import ModelStore
from stpm.options import option
from stpm.record import ModelRecord
from stpm.scoring.blocks import ManifestBlocks
from stpm.scoring.checkpoint import FileNames, checkpoints
from stpm.scoring.decode import IMAGE_SECONDS, TASK_BYTES, Decode
from stpm.scoring.heatmaps import WriteHeatmaps
from stpm.scoring.ledger import Effort
from stpm.scoring.manifest import BLOCK_ROWS, Shard
from stpm.scoring.pool import ScorerPool
from stpm.scoring.progress import Left, Progress, followed
from stpm.scoring.scorer import LARGEST_BATCH, Scorer
from stpm.scoring.target import Target


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


def planned(options: ScoreOptions, node: Resources) -> str:
    """What would score on a node of the connected cluster, and how much could be prepared beside it, in words."""
    pool = ScorerPool.of(options.scorers, working_nodes(), sys.maxsize, grows=is_shared())
    cpus = node.get("CPU", 0)
    here = min(pool.size, int(node.get("GPU", 0)) if pool.num_gpus else int(cpus))
    scorers = f"{here} scorers of {pool.num_cpus:g} CPU{', 1 GPU' if pool.num_gpus else ''}; " if here else ""
    beside = int(round((cpus - here * pool.num_cpus) / pool.stage_cpus, 6))
    return f"{scorers}{beside} tasks that fetch, decode and write" if cpus else ""


def score_shards(
    shards: Sequence[Shard],
    records: Mapping[str, ModelRecord],
    store: ModelStore,
    options: ScoreOptions,
    target: Target,
    progress: Progress,
) -> tuple[Effort, list[Left]]:
    """Score every row of some manifest shards and write one output row each. Needs a connection to Ray.

    Of an image that storage, a model or a device failed no row is written, unless such errors are accepted.

    Args:
        shards: of schema MANIFEST, with the user's own columns.
        records: the model of each category; rows of any other category become rows with an error, and so do those whose
            model is fitted anew meanwhile.
        store: the models.
        options: how.
        target: where to.
        progress: told how far it is.

    Returns:
        What it took, from the first image on, where `seconds` is not filled in; and the first images without a row.

    Raises:
        ConfigError: if the scorers do not fit the cluster.
        CutOffError: if too many images failed for what is not their own fault.
        RayError: if a node or Ray failed for good.
    """
    blocks = ManifestBlocks(shards)
    preprocessing = {name: record.preprocessing for name, record in records.items()}
    nodes = working_nodes()
    pool = ScorerPool.of(options.scorers, nodes, len(blocks), grows=is_shared())
    context = DataContext.get_current().copy()
    context.op_resource_reservation_ratio = pool.set_aside
    context.checkpoint_config = checkpoints(target.checkpoint)
    out_filesystem, out_path = storage.arrow_filesystem(target.scores)
    pictures = f"heatmaps/{target.name}"
    with DataContext.current(context), followed(progress, breaks=not options.accept_errors) as report:
        write = WriteHeatmaps(
            target.out, pictures, target.heatmaps, preprocessing, target.overlays, target.heatmaps_in, report
        )
        of_each = write.partitioned if target.partition_by == "category" else write.__call__
        scored = (
            ray.data.read_datasource(
                blocks, override_num_blocks=len(blocks), num_cpus=pool.stage_cpus, memory=pool.memory_for(TASK_BYTES)
            )
            .map_batches(
                Decode(preprocessing, options.image_seconds, report=report).__call__,
                batch_format="pyarrow",
                batch_size=BLOCK_ROWS,
                num_cpus=pool.stage_cpus,
                memory=pool.memory_for(TASK_BYTES),
            )
            .map_batches(
                Scorer,
                fn_constructor_args=(
                    store.uri,
                    options.false_alarm_rate,
                    target.raw_maps,
                    target.overlays,
                    options.batch_size,
                    int(options.model_memory_gib * 2**30),
                    0,
                    report,
                    {name: record.model_id for name, record in records.items()},
                    options.accept_errors,
                ),
                compute=ActorPoolStrategy(min_size=pool.size, max_size=pool.most),
                batch_format="pyarrow",
                batch_size=LARGEST_BATCH if pool.num_gpus else BLOCK_ROWS,
                num_cpus=pool.num_cpus,
                num_gpus=pool.num_gpus,
                runtime_env=KEEPING_MEMORY,
            )
            .map_batches(
                of_each,
                batch_format="pyarrow",
                batch_size=BLOCK_ROWS,
                num_cpus=pool.stage_cpus,
            )
        )
        try:
            scored.write_parquet(
                out_path,
                filesystem=out_filesystem,
                partition_cols=["category"] if target.partition_by == "category" else None,
                filename_provider=FileNames(target.name),
                min_rows_per_file=min(options.rows_per_file, BLOCK_ROWS) if target.raw_maps else options.rows_per_file,
                ray_remote_args={"num_cpus": pool.stage_cpus},
            )
        except (RayError, SystemException) as error:
            if reason := report.broken():
                raise CutOffError(
                    f"scoring was stopped: {reason}; what was done is kept. Put right what failed and run the same "
                    "command again, or take such errors as results with --accept-errors"
                ) from error
            raise
        done = report.total()
        effort = Effort(
            images=sum(rows for _, rows in shards),
            steady_images_per_second=round(report.speed(), 3),
            decode_seconds=round(done.decode_seconds, 3),
            forward_seconds=round(done.forward_seconds, 3),
            encode_seconds=round(done.encode_seconds, 3),
            device="gpu" if pool.num_gpus else "cpu",
            cpus=sum(node["CPU"] for node in nodes),
            gpus=sum(node.get("GPU", 0.0) for node in nodes),
        )
        return effort, report.left()
