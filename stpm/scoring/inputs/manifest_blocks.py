"""The manifest as a data source of Ray Data: each task reads several shards, and orders their rows by category.

Ray splits the rows of a task into blocks. Its own Parquet reader uses tasks of a whole CPU, which would never start:
scorers hold nearly all CPUs. With a task for each block, the driver would need a millisecond and 3 KB for each before
the first one starts.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from stpm import storage
from stpm.scoring.inputs.manifest import BLOCK_ROWS, SHARD_ROWS, Shard, contains, read_shard

# Rows that are ordered by category together: many times those of a block, and few megabytes.
_TASK_ROWS = 8 * SHARD_ROWS
# Estimate of a row's bytes. Without it Ray assumes that each task returns its largest block, and runs few tasks.
_ROW_BYTES = 200

# A shard, and which of its rows that are still to be scored.
Part = tuple[Shard, slice]


class ManifestBlocks(Datasource):  # type: ignore[misc]
    """Rows of manifest shards that are still to be scored, in blocks of at most `BLOCK_ROWS`."""

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
        longest = max(map(_count_rows, self._tasks), default=0)
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

        def metadata(rows: int) -> BlockMetadata:
            return BlockMetadata(num_rows=rows, size_bytes=rows * _ROW_BYTES, exec_stats=None, input_files=None)

        return [
            ReadTask(partial(_read, parts), metadata(_count_rows(parts)), per_task_row_limit=per_task_row_limit)
            for parts in self._tasks
        ]


def divide_evenly(shards: Sequence[Shard], max_rows: int) -> list[list[Part]]:
    """Divide the rows of all shards, in order, into the fewest tasks of at most `max_rows` rows.

    The lengths of the tasks differ by at most one row: Ray splits each into the same number of blocks.
    """
    total = sum(shard.rows for shard in shards)
    count = -(-total // max_rows)
    bounds = [total * number // count for number in range(count + 1)] if count else []
    firsts = [0, *accumulate(shard.rows for shard in shards)]

    def part(number: int, start: int, stop: int) -> Part:
        first, shard = firsts[number], shards[number]
        return shard, slice(max(start - first, 0), min(stop - first, shard.rows))

    return [
        [part(number, start, stop) for number in range(bisect_right(firsts, start) - 1, bisect_left(firsts, stop))]
        for start, stop in pairwise(bounds)
    ]


def _count_rows(parts: Sequence[Part]) -> int:
    return sum(inside.stop - inside.start for _, inside in parts)


def _read(parts: Sequence[Part]) -> Iterator[pa.Table]:
    yield _by_category(pa.concat_tables(storage.in_parallel(_read_part, parts)))


def _read_part(part: Part) -> pa.Table:
    shard, inside = part
    rows = read_shard(shard.uri)
    if shard.written is not None:
        rows = rows.filter(pa.array(~contains(shard.written, rows["image_id"].to_numpy())))
    return rows.slice(inside.start, inside.stop - inside.start)


def _by_category(rows: pa.Table) -> pa.Table:
    """Order rows by category, so that a scorer loads a model for all of them, and not again for each block.

    The images inside Parquet files come first, in their order: whoever reads one reads its whole row group.
    """
    is_in_parquet = pc.equal(rows["archive_length"], 1)
    return rows.take(pc.sort_indices(pc.if_else(is_in_parquet, "", rows["category"])))
