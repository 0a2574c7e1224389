"""The manifest as Ray Data reads it: a task for each block of few rows, a row group of a shard.

Ray's own reader of Parquet lists shards in a task of a whole CPU, reads them whole, and cuts them up in tasks of a
whole CPU: where scorers hold nearly all CPUs, that never ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from stpm import storage
from stpm.scoring.inputs.manifest import BLOCK_ROWS, Shard

# About. Where Ray is told nothing it takes each task's output for its largest block, and lets few tasks run at a time.
_ROW_BYTES = 200


class ManifestBlocks(Datasource):  # type: ignore[misc]
    """Rows of some shards, in blocks of at most `BLOCK_ROWS`.

    Args:
        shards: URIs of Parquet files whose row groups are such blocks, with the number of rows in each.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        super().__init__()
        self._blocks = [
            (uri, group, min(BLOCK_ROWS, rows - group * BLOCK_ROWS))
            for uri, rows in shards
            for group in range(-(-rows // BLOCK_ROWS))
        ]

    def __len__(self) -> int:
        return len(self._blocks)

    def get_name(self) -> str:
        return "Manifest"

    def estimate_inmemory_data_size(self) -> None:
        """Unknown to Ray, and small."""

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One for each block."""
        return [
            ReadTask(
                partial(_read, uri, group),
                BlockMetadata(num_rows=rows, size_bytes=rows * _ROW_BYTES, exec_stats=None, input_files=None),
                per_task_row_limit=per_task_row_limit,
            )
            for uri, group, rows in self._blocks
        ]


def _read(uri: str, group: int) -> Iterator[pa.Table]:
    yield storage.read_row_group(uri, group)
