"""The chain of stages: manifest → decode (CPU tasks) → teacher and models (actors) → PNG (CPU tasks) → Parquet."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.exceptions import SystemException
from ray.exceptions import RayError

from stpm import storage
from stpm.cluster.connection import KEEPING_MEMORY, Resources, is_shared, working_nodes
from stpm.errors import CutOffError
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.scoring.inputs.manifest import BLOCK_ROWS, Shard
from stpm.scoring.options import ScoreOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.progress import Left, Progress, followed
from stpm.scoring.resuming.manifest_blocks import ManifestBlocks
from stpm.scoring.resuming.row_checkpoints import FileNames, checkpoints
from stpm.scoring.resuming.run_state import Effort
from stpm.scoring.scorer_pool import ScorerPool
from stpm.scoring.stages.batch_size import MAX_BATCH
from stpm.scoring.stages.decode import TASK_BYTES, Decode
from stpm.scoring.stages.heatmaps import WriteHeatmaps
from stpm.scoring.stages.scorer_actor import ScorerActor, ScorerSettings


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
    output: RunOutput,
    progress: Progress,
) -> tuple[Effort, list[Left]]:
    """Score every row of some manifest shards and write one output row each. Needs a connection to Ray.

    Of an image that storage, a model or a device failed no row is written, unless such errors are accepted.

    Args:
        shards: of schema MANIFEST, with the user's own columns.
        records: the model of each category; rows of any other category become rows with an error.
        store: the models.
        options: how.
        output: where to.
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
    context.op_resource_reservation_ratio = pool.reserved
    context.checkpoint_config = checkpoints(output.checkpoint)
    out_filesystem, out_path = storage.arrow_filesystem(output.scores)
    pictures = f"heatmaps/{output.name}"
    settings = ScorerSettings(
        store=store.uri,
        false_alarm_rate=options.false_alarm_rate,
        raw_maps=output.raw_maps,
        overlays=output.overlays,
        batch_size=options.batch_size,
        model_memory=int(options.model_memory_gib * 2**30),
        model_ids={name: record.model_id for name, record in records.items()},
        accept_errors=options.accept_errors,
    )
    with DataContext.current(context), followed(progress, breaks=not options.accept_errors) as report:
        write = WriteHeatmaps(
            output.out, pictures, output.heatmaps, preprocessing, output.overlays, output.heatmaps_in, report
        )
        of_each = write.partitioned if output.partition_by == "category" else write.__call__
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
                ScorerActor,
                fn_constructor_args=(settings, report),
                compute=ActorPoolStrategy(min_size=pool.size, max_size=pool.most),
                batch_format="pyarrow",
                batch_size=MAX_BATCH if pool.num_gpus else BLOCK_ROWS,
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
                partition_cols=["category"] if output.partition_by == "category" else None,
                filename_provider=FileNames(output.name),
                min_rows_per_file=min(options.rows_per_file, BLOCK_ROWS) if output.raw_maps else options.rows_per_file,
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
