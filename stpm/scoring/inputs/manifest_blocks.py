"""The manifest as a data source of Ray Data: each task reads several shards, and orders their rows by category.

Ray splits the rows of a task into blocks. Its own Parquet reader uses tasks of a whole CPU, which would never start:
scorers hold nearly all CPUs. With a task for each block, the driver would need a millisecond and 3 KB for each before
the first one starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from stpm import storage
from stpm.scoring.inputs.manifest import BLOCK_ROWS, SHARD_ROWS, Shard, read_shard

# Rows that are ordered by category together: many times those of a block, and few megabytes.
_TASK_ROWS = 8 * SHARD_ROWS
# Estimate of a row's bytes. Without it Ray assumes that each task returns its largest block, and runs few tasks.
_ROW_BYTES = 200


class ShardSlice(NamedTuple):
    """The rows of a shard from `start` to before `stop`."""

    uri: str
    start: int
    stop: int


class ManifestBlocks(Datasource):  # type: ignore[misc]
    """Rows of manifest shards, in blocks of at most `BLOCK_ROWS`.

    Args:
        shards: Parquet files, with the number of rows in each.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        super().__init__()
        self._blocks = -(-sum(shard.rows for shard in shards) // BLOCK_ROWS)
        self._tasks = divide_evenly(shards, _TASK_ROWS)

    def __len__(self) -> int:
        """Return the number of blocks."""
        return self._blocks

    @property
    def task_count(self) -> int:
        """The number of tasks."""
        return len(self._tasks)

    @property
    def parallelism(self) -> int:
        """The number to request from Ray, which then splits the rows of each task into blocks."""
        longest = max((_count_rows(slices) for slices in self._tasks), default=0)
        return self.task_count * -(-longest // BLOCK_ROWS)

    def get_name(self) -> str:
        """Return the name that Ray logs."""
        return "Manifest"

    def estimate_inmemory_data_size(self) -> None:
        """Return no estimate: the manifest is small."""

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return the tasks."""
        return [
            ReadTask(
                partial(_read, slices),
                BlockMetadata(
                    num_rows=_count_rows(slices),
                    size_bytes=_count_rows(slices) * _ROW_BYTES,
                    exec_stats=None,
                    input_files=None,
                ),
                per_task_row_limit=per_task_row_limit,
            )
            for slices in self._tasks
        ]


def divide_evenly(shards: Sequence[Shard], max_rows: int) -> list[list[ShardSlice]]:
    """Divide the rows of all shards, in order, into the fewest tasks of at most `max_rows` rows.

    The lengths of the tasks differ by at most one row: Ray splits each into the same number of blocks.
    """
    total = sum(shard.rows for shard in shards)
    count = -(-total // max_rows)
    ends = [total * number // count for number in range(1, count + 1)]
    divided: list[list[ShardSlice]] = [[]] if ends else []
    position = 0
    for uri, rows in shards:
        start = 0
        while start < rows:
            if position == ends[len(divided) - 1]:
                divided.append([])
            stop = min(rows, start + ends[len(divided) - 1] - position)
            divided[-1].append(ShardSlice(uri, start, stop))
            position += stop - start
            start = stop
    return divided


def _count_rows(slices: Sequence[ShardSlice]) -> int:
    return sum(stop - start for _, start, stop in slices)


def _read(slices: Sequence[ShardSlice]) -> Iterator[pa.Table]:
    def read(part: ShardSlice) -> pa.Table:
        return read_shard(part.uri).slice(part.start, part.stop - part.start)

    yield _by_category(pa.concat_tables(storage.in_parallel(read, slices)))


def _by_category(rows: pa.Table) -> pa.Table:
    """Order rows by category, so that a scorer loads a model for all of them, and not again for each block.

    The images inside Parquet files come first, in their order: whoever reads one reads its whole row group.
    """
    is_in_parquet = pc.equal(rows["archive_length"], 1)
    return rows.take(pc.sort_indices(pc.if_else(is_in_parquet, "", rows["category"])))
