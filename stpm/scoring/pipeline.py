"""The pipeline of stages: manifest → decode (CPU tasks) → score (actors) → draw heatmaps (CPU tasks) → Parquet."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import ray
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources
from ray.data._internal.cluster_autoscaler import RateBasedClusterAutoscaler
from ray.exceptions import RayError

from stpm.cluster.connection import is_shared, working_nodes
from stpm.cluster.device import KEEP_FREED_MEMORY, examine_devices
from stpm.cluster.placement import nodes_for_plan
from stpm.errors import RunInterruptedError
from stpm.method.arithmetic import Arithmetic, choose_arithmetic, warn_of_other_arithmetic
from stpm.scoring.inputs.manifest import Shard
from stpm.scoring.inputs.manifest_blocks import ManifestBlocks
from stpm.scoring.progress import ProgressReporter
from stpm.scoring.run_state import RunState
from stpm.scoring.scorer_pool import ScorerPool, count_scorers
from stpm.scoring.scoring_run import ModelRecords, ScoringRun
from stpm.scoring.stages.batch_size import MAX_BATCH
from stpm.scoring.stages.decode import TASK_BYTES, Decode
from stpm.scoring.stages.draw_heatmaps import DrawHeatmaps
from stpm.scoring.stages.scorer import Scorer
from stpm.scoring.stages.write_rows import RowWriter

# Tasks that read the manifest at the same time.
_READING_TASKS = 2
# Blocks have `BLOCK_ROWS` images or a few less: with batches of `BLOCK_ROWS`, Ray would give each task two of them.
_WHOLE_BLOCK = None

log = logging.getLogger(__name__)


def score_shards(
    run: ScoringRun,
    shards: Sequence[Shard],
    segment: int,
    models: ModelRecords,
    progress: ProgressReporter,
    state: RunState,
) -> None:
    """Score the rows of a segment that have no output row yet, and write one for each. Needs a connection to Ray.

    An image that failed because of storage, a model or a device gets no row, unless the options accept such errors.

    Args:
        shards: of the segment, with rows to score.
        models: rows of other categories become rows with an error.
        progress: gets the statistics and the images without a row.
        state: gets what computes the features.

    Raises:
        ConfigError: if the scorers do not fit the cluster, or OpenVINO is wanted and not installed.
        DeviceError: if torch cannot use a GPU that Ray assigns.
        RunInterruptedError: if too many images failed because of storage, a model or a device, or no node came in time.
        RayError: if a node or Ray failed.
    """
    options, config, output = run.options, run.config, run.output
    blocks = ManifestBlocks(shards)
    preprocessing = {name: record.preprocessing for name, record in models.items()}
    pool = ScorerPool.for_nodes(options.scorers, nodes_for_plan(run.cluster), len(blocks), grows=is_shared())
    task_ram = pool.ram_for(TASK_BYTES)
    arithmetic = choose_and_record_arithmetic(run, state, models, gpus=pool.scorer_gpus > 0)
    log.info(f"{count_scorers(pool.size)} on {'GPUs' if pool.scorer_gpus else 'CPUs'}, {arithmetic}")
    context = DataContext.get_current().copy()
    context.op_resource_reservation_ratio = pool.reserved_fraction
    patch_ray_to_count_all_cpus()
    with DataContext.current(context):
        rows = ray.data.read_datasource(
            blocks,
            override_num_blocks=blocks.parallelism,
            # The other stages need the CPUs.
            num_cpus=0,
            concurrency=min(_READING_TASKS, blocks.task_count),
        )
        rows = rows.map_batches(
            Decode(preprocessing, options.image_seconds, progress=progress).__call__,
            batch_format="pyarrow",
            batch_size=_WHOLE_BLOCK,
            num_cpus=pool.task_cpus,
            memory=task_ram,
        )
        rows = rows.map_batches(
            Scorer,
            fn_constructor_args=(run.store, models, options, config.output, arithmetic, progress),
            compute=ActorPoolStrategy(min_size=pool.size, max_size=pool.max_size),
            batch_format="pyarrow",
            batch_size=MAX_BATCH if pool.scorer_gpus else _WHOLE_BLOCK,
            num_cpus=pool.scorer_cpus,
            num_gpus=pool.scorer_gpus,
            # OpenVINO frees nothing large, and Ray starts a process with variables of its own later.
            runtime_env=KEEP_FREED_MEMORY if arithmetic.backend == "pytorch" and not pool.scorer_gpus else {},
        )
        rows = rows.map_batches(
            DrawHeatmaps(output, config.output, preprocessing, progress).__call__,
            batch_format="pyarrow",
            batch_size=_WHOLE_BLOCK,
            num_cpus=pool.task_cpus,
        )
        try:
            rows.write_datasink(
                RowWriter(output, config.output, segment, options.rows_per_file),
                ray_remote_args={"num_cpus": pool.task_cpus},
            )
        except RayError as error:
            if stop_reason := progress.read().stop_reason:
                raise RunInterruptedError(
                    f"scoring was stopped: {stop_reason}. Repair that, and run the same command again: finished work "
                    "is kept"
                ) from error
            raise


def choose_and_record_arithmetic(run: ScoringRun, state: RunState, models: ModelRecords, *, gpus: bool) -> Arithmetic:
    """Choose what computes the features from now on, on GPUs or on CPUs, and record it. Needs a connection to Ray.

    Warn if that changes during the run, and where models were calibrated otherwise.

    Raises:
        ConfigError: if OpenVINO is wanted and not installed.
        DeviceError: if torch cannot use a GPU that Ray assigns.
    """
    before = state.record.arithmetic
    found = choose_arithmetic(examine_devices(gpus=gpus), run.cluster.backend, before=before)
    if found == before:
        return found
    state.write(replace(state.record, arithmetic=found))
    if before:
        log.warning(f"the remaining images may get slightly other scores: {before} has computed them, and now {found}")
    calibrated = [(record.fit.backend, record.precision) for record in models.values()]
    if warning := warn_of_other_arithmetic(found, calibrated):
        log.warning(warning)
    return found


def patch_ray_to_count_all_cpus() -> None:
    """Replace a method of Ray Data, so that it counts on all resources of all nodes.

    By default it counts on what its `AutoscalingCoordinator` leaves it, which came with ray-project/ray#59353. In Ray
    2.60 that is what it has requested, and of the CPUs that are free on a node, whole ones only. Where scorers take
    nearly all CPUs, that leaves none for the last stage, which then draws and writes nothing before all images are
    scored.
    """
    RateBasedClusterAutoscaler.get_total_resources = _total_resources


def _total_resources(_: RateBasedClusterAutoscaler) -> ExecutionResources:
    total = ExecutionResources.zero()
    for node in working_nodes():
        total = total.add(ExecutionResources.from_resource_dict(node))
    return total
