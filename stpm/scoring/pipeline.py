"""The chain of stages: manifest → decode (CPU tasks) → teacher and students (actors) → PNG (CPU tasks) → Parquet."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.datasource import FilenameProvider

from stpm import storage
from stpm.cluster import KEEPING_MEMORY, Resources, is_shared, working_nodes
from stpm.models import ModelStore
from stpm.record import ModelRecord
from stpm.scoring.blocks import ManifestBlocks
from stpm.scoring.checkpoint import checkpoints
from stpm.scoring.decode import Decode
from stpm.scoring.heatmaps import WriteHeatmaps
from stpm.scoring.ledger import Effort
from stpm.scoring.manifest import BLOCK_ROWS, Shard
from stpm.scoring.options import ScoreOptions
from stpm.scoring.pool import ScorerPool
from stpm.scoring.progress import Progress, followed
from stpm.scoring.scorer_actor import LARGEST_BATCH, ScorerActor
from stpm.scoring.target import Target


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
) -> Effort:
    """Score every row of some manifest shards and write one output row each. Needs a connection to Ray.

    Args:
        shards: of schema MANIFEST, with the user's own columns.
        records: the model of each category; rows of any other category become rows with an error, and so do those whose
            model is fitted anew meanwhile.
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
    preprocessing = {name: record.preprocessing for name, record in records.items()}
    nodes = working_nodes()
    pool = ScorerPool.of(options.scorers, nodes, len(blocks), grows=is_shared())
    context = DataContext.get_current().copy()
    context.op_resource_reservation_ratio = pool.set_aside
    context.checkpoint_config = checkpoints(target.checkpoint)
    out_filesystem, out_path = storage.arrow_filesystem(target.scores)
    pictures = f"heatmaps/{target.name}"
    with DataContext.current(context), followed(progress) as report:
        write = WriteHeatmaps(
            target.out, pictures, target.heatmaps, preprocessing, target.overlays, target.heatmaps_in, report
        )
        of_each = write.partitioned if target.partition_by == "category" else write.__call__
        (
            ray.data.read_datasource(blocks, override_num_blocks=len(blocks), num_cpus=pool.stage_cpus)
            .map_batches(
                Decode(preprocessing, options.image_seconds, report=report).__call__,
                batch_format="pyarrow",
                batch_size=BLOCK_ROWS,
                num_cpus=pool.stage_cpus,
            )
            .map_batches(
                ScorerActor,
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
            .write_parquet(
                out_path,
                filesystem=out_filesystem,
                partition_cols=["category"] if target.partition_by == "category" else None,
                filename_provider=FilenameProvider(target.name, "parquet"),
                min_rows_per_file=min(options.rows_per_file, BLOCK_ROWS) if target.raw_maps else options.rows_per_file,
                ray_remote_args={"num_cpus": pool.stage_cpus},
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
