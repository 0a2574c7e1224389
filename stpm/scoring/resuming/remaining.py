"""The rows that a resumed run has yet to score: those of the manifest whose ids are in no checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from stpm import storage
from stpm.cluster.ray_failures import results_of
from stpm.errors import DataError, RunDamagedError
from stpm.scoring.inputs.manifest import Segment, Shard, read_shard
from stpm.scoring.output import RunOutput
from stpm.scoring.resuming.row_checkpoints import committed_checkpoints, read_summary, summary_of
from stpm.scoring.row_summary import RowSummary
from stpm.scoring.schema import MANIFEST, Int64Array

# CPUs of the task: few enough to start beside another run that holds nearly all CPUs.
_CPUS = 0.1

# The checkpoint of the rows that earlier attempts wrote.
_ACCEPTED = "accepted.parquet"
# Of a checkpoint.
_IDS = pa.schema([MANIFEST.field("image_id")])


def remaining_shards(
    earlier: RunOutput, output: RunOutput, segments: Sequence[Segment], max_ranked: int
) -> list[tuple[Shard, ...]]:
    """Take over the rows that the attempt before this one wrote, and list for each segment the shards of the others.

    A segment of which no row is written keeps its shards. The others are read in tasks, one for each: their ids may not
    fit the driver's memory. Needs a connection to Ray.

    Args:
        earlier: output of the attempt before this one.
        output: of this attempt.
        segments: that are not committed.
        max_ranked: number of the most anomalous images to name.

    Raises:
        RunDamagedError: if a checkpoint or a shard is damaged.
    """
    remote = ray.remote(num_cpus=_CPUS)(write_remaining)
    started = earlier.segments_with_checkpoints()
    tasks = {each: remote.remote(earlier, output, each, max_ranked) for each in segments if each.number in started}
    shards = dict(zip(tasks, results_of(list(tasks.values())), strict=True))
    return [shards.get(each, each.shards) for each in segments]


def write_remaining(earlier: RunOutput, output: RunOutput, segment: Segment, max_ranked: int) -> tuple[Shard, ...]:
    """Add up a segment's checkpoints of the earlier attempt in one of this attempt; write the other rows as shards."""
    committed = committed_checkpoints(earlier.segment_checkpoints(segment.number))
    if not committed:
        return segment.shards
    written = np.sort(np.concatenate(storage.in_parallel(_read_ids, committed)))
    accepted = storage.join(output.segment_checkpoints(segment.number), _ACCEPTED)
    summary = RowSummary.total(storage.in_parallel(read_summary, map(summary_of, committed)), max_ranked)
    storage.publish(summary_of(accepted), summary.to_json())
    storage.publish(accepted, storage.encode_parquet(pa.table([written], schema=_IDS)))
    folder = output.segment_remaining(segment.number)
    copies = storage.in_parallel(lambda shard: _write_unwritten(shard, written, folder), segment.shards)
    return tuple(copy for copy in copies if copy.rows)


def _write_unwritten(shard: Shard, written: Int64Array, folder: str) -> Shard:
    """Copy a shard without the rows whose ids are in a sorted array; without rows nothing is written."""
    table = read_shard(shard.uri)
    rows = table.filter(pa.array(~contains(written, table["image_id"].to_numpy())))
    copy = storage.join(folder, shard.uri.rsplit("/", 1)[-1])
    if rows.num_rows:
        storage.publish(copy, storage.encode_parquet(rows))
    return Shard(copy, rows.num_rows)


def contains(ordered: Int64Array, ids: Int64Array) -> npt.NDArray[np.bool_]:
    """Return whether each id is in a sorted array."""
    if not len(ordered):
        return np.zeros(len(ids), bool)
    found: npt.NDArray[np.bool_] = ordered[np.minimum(np.searchsorted(ordered, ids), len(ordered) - 1)] == ids
    return found


def _read_ids(checkpoint: str) -> Int64Array:
    try:
        ids: Int64Array = storage.read_columns(checkpoint, _IDS)["image_id"].to_numpy()
    except DataError as error:
        raise RunDamagedError(f"{error}; the written rows are no longer known") from error
    return ids
