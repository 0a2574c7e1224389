"""The pipeline of stages: manifest → decode (CPU tasks) → score (actors) → draw heatmaps (CPU tasks) → Parquet."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import ray
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources
from ray.data._internal.cluster_autoscaler import RateBasedClusterAutoscaler
from ray.exceptions import RayError

from stpm.cluster.connection import KEEP_FREED_MEMORY, is_shared, working_nodes
from stpm.cluster.placement import nodes_for_plan
from stpm.errors import CutOffError
from stpm.scoring.inputs.manifest import Shard
from stpm.scoring.inputs.manifest_blocks import ManifestBlocks
from stpm.scoring.progress import ProgressReporter
from stpm.scoring.resuming.row_checkpoints import checkpoint_config
from stpm.scoring.run_arithmetic import settle_arithmetic
from stpm.scoring.run_state import RunState
from stpm.scoring.scorer_pool import ScorerPool, count_scorers
from stpm.scoring.scoring_run import ModelRecords, ScoringRun
from stpm.scoring.stages.batch_size import MAX_BATCH
from stpm.scoring.stages.decode import TASK_BYTES, Decode
from stpm.scoring.stages.draw_heatmaps import DrawHeatmaps
from stpm.scoring.stages.scorer_actor import ScorerActor, ScorerSettings
from stpm.scoring.stages.write_rows import RowWriter

# Tasks that read the manifest at the same time.
_READING_TASKS = 2
# Blocks have `BLOCK_ROWS` images or a few less: with batches of `BLOCK_ROWS`, Ray would give each task two of them.
_WHOLE_BLOCK = None

log = logging.getLogger(__name__)


def score_shards(
    run: ScoringRun,
    shards: Sequence[Shard],
    checkpoints: str,
    models: ModelRecords,
    progress: ProgressReporter,
    state: RunState,
) -> None:
    """Score all rows of some manifest shards and write one output row for each. Needs a connection to Ray.

    An image that failed because of storage, a model or a device gets no row, unless the options accept such errors.

    Args:
        run: how to score, and where to write.
        shards: Parquet files of schema MANIFEST, with passthrough columns.
        checkpoints: URI of the folder for the ids and the summaries of written rows.
        models: by category; rows of other categories become rows with an error.
        progress: gets the statistics and the images without a row.
        state: of the run; gets what computes the features.

    Raises:
        ConfigError: if the scorers do not fit the cluster, or OpenVINO is wanted and not installed.
        DeviceError: if torch cannot use a GPU that Ray assigns.
        CutOffError: if too many images failed because of storage, a model or a device, or no node came in time.
        RayError: if a node or Ray failed.
    """
    options, config, output = run.options, run.config, run.output
    blocks = ManifestBlocks(shards)
    preprocessing = {name: record.preprocessing for name, record in models.items()}
    pool = ScorerPool.for_nodes(options.scorers, nodes_for_plan(run.cluster), len(blocks), grows=is_shared())
    task_ram = pool.ram_for(TASK_BYTES)
    settings = ScorerSettings(
        store=run.store.uri,
        model_ids={name: record.model_id for name, record in models.items()},
        false_alarm_rate=config.false_alarm_rate,
        raw_maps=config.output.raw_maps,
        overlays=config.output.overlay,
        batch_size=options.scoring_batch_size,
        model_ram=int(options.model_ram_gib * 2**30),
        accept_errors=options.accept_errors,
        arithmetic=settle_arithmetic(run, state, models, gpus=pool.scorer_gpus > 0),
    )
    log.info(f"{count_scorers(pool.size)} on {'GPUs' if pool.scorer_gpus else 'CPUs'}, {settings.arithmetic}")
    context = DataContext.get_current().copy()
    context.op_resource_reservation_ratio = pool.reserved_fraction
    context.checkpoint_config = checkpoint_config(checkpoints)
    count_on_all_nodes()
    with DataContext.current(context):
        rows = ray.data.read_datasource(
            blocks,
            override_num_blocks=blocks.parallelism,
            # The other stages need the CPUs.
            num_cpus=0,
            concurrency=min(_READING_TASKS, blocks.task_count),
        )
        rows = rows.map_batches(
            Decode(
                preprocessing, options.image_seconds, progress=progress, count_repetitions=count_repetitions
            ).__call__,
            batch_format="pyarrow",
            batch_size=_WHOLE_BLOCK,
            num_cpus=pool.task_cpus,
            memory=task_ram,
        )
        rows = rows.map_batches(
            ScorerActor,
            fn_constructor_args=(settings, progress),
            compute=ActorPoolStrategy(min_size=pool.size, max_size=pool.max_size),
            batch_format="pyarrow",
            batch_size=MAX_BATCH if pool.scorer_gpus else _WHOLE_BLOCK,
            num_cpus=pool.scorer_cpus,
            num_gpus=pool.scorer_gpus,
            runtime_env=KEEP_FREED_MEMORY,
        )
        rows = rows.map_batches(
            DrawHeatmaps(output, config.output, preprocessing, progress).__call__,
            batch_format="pyarrow",
            batch_size=_WHOLE_BLOCK,
            num_cpus=pool.task_cpus,
        )
        try:
            rows.write_datasink(
                RowWriter(output, config.output, checkpoints, options.rows_per_file, run.triage_images),
                ray_remote_args={"num_cpus": pool.task_cpus},
            )
        except RayError as error:
            if stop_reason := progress.read().stop_reason:
                raise CutOffError(
                    f"scoring was stopped: {stop_reason}. Repair that, and run the same command again: what was done "
                    "is kept"
                ) from error
            raise


def count_repetitions() -> int:
    """Return how often Ray has repeated the current task."""
    attempt: int = ray._private.worker.global_worker.core_worker.get_current_task_attempt_number()
    return attempt


def count_on_all_nodes() -> None:
    """Let Ray Data count on all resources of all nodes.

    By default it counts on what its `AutoscalingCoordinator` leaves it. In Ray 2.60 that is what it has requested, and
    of the CPUs that are free on a node, whole ones only. Where scorers take nearly all CPUs, that leaves none for the
    last stage, which then draws and writes nothing before all images are scored.
    """
    RateBasedClusterAutoscaler.get_total_resources = _total_resources


def _total_resources(_: RateBasedClusterAutoscaler) -> ExecutionResources:
    total = ExecutionResources.zero()
    for node in working_nodes():
        total = total.add(ExecutionResources.from_resource_dict(node))
    return total
