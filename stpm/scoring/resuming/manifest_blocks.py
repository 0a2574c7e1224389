"""The manifest as a data source of Ray Data: one task per block, which is a row group of a shard.

Ray's own Parquet reader uses tasks of a whole CPU. Scorers hold nearly all CPUs, and such tasks would never start.
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

# Bytes of a row, roughly. Without an estimate Ray assumes that each task returns its largest block, and runs few tasks.
_ROW_BYTES = 200


class ManifestBlocks(Datasource):  # type: ignore[misc]
    """Rows of manifest shards, in blocks of at most `BLOCK_ROWS`.

    Args:
        shards: Parquet files whose row groups are the blocks, with the number of rows in each file.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        super().__init__()
        self._blocks = [
            (uri, group, min(BLOCK_ROWS, rows - group * BLOCK_ROWS))
            for uri, rows in shards
            for group in range(-(-rows // BLOCK_ROWS))
        ]

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._blocks)

    def get_name(self) -> str:
        """Return the name that Ray logs."""
        return "Manifest"

    def estimate_inmemory_data_size(self) -> None:
        """Return no estimate: the manifest is small."""

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return one task for each block."""
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
