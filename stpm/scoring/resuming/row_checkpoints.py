"""Ray Data's row checkpoint: the id of each written row is recorded, so that a killed run can be resumed.

A task that writes rows first writes their ids under a pending name, then the rows, then their summary, and commits all
of them by renaming the file of ids. Of a task that was cut off, the next run removes what is there.

The configuration is sent to every task, which imports this module to read it: no torch here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from ray.data._internal.datasource.parquet_datasink import ParquetDatasink
from ray.data.checkpoint import CheckpointConfig, CheckpointManager
from ray.data.datasource import FilenameProvider

from stpm import storage
from stpm.scoring.inputs.manifest import BLOCK_ROWS
from stpm.scoring.output import RunOutput
from stpm.scoring.row_summary import RowSummary

_PENDING = ".pending.parquet"
_IDS = ".parquet"
_SUMMARY = ".json"
# The name under which Ray gives a write task the id of its execution.
_WRITE_UUID = "write_uuid"
# Rows of a row group, at most: to show an image's heatmap, one row group is read.
_ROW_GROUP_ROWS = 512


def checkpoint_config(folder: str) -> CheckpointConfig:
    """Configure Ray Data to record the ids of written rows in a folder."""
    filesystem, path = storage.arrow_filesystem(folder)
    return CheckpointConfig(
        id_column="image_id",
        checkpoint_path=path,
        override_filesystem=filesystem,
        delete_checkpoint_on_success=False,
        checkpoint_manager_cls=PendingCheckpointCleaner,
    )


def committed_checkpoints(folder: str) -> list[str]:
    """List the checkpoints whose rows are written.

    Ray commits a checkpoint by renaming it. A store without renames copies and then removes: if that was cut off, both
    names exist, and the rows do too.
    """
    uris = [uri for uri, _ in storage.files(folder) if uri.endswith(_IDS)]
    pending = {uri for uri in uris if uri.endswith(_PENDING)}
    committed = [uri for uri in uris if uri not in pending]
    for uri in committed:
        if (copied_from := uri.removesuffix(_IDS) + _PENDING) in pending:
            storage.remove(copied_from)
    return committed


def summary_of(checkpoint: str) -> str:
    """Return the URI of the summary of a checkpoint's rows."""
    return checkpoint.removesuffix(_IDS) + _SUMMARY


def task_of(checkpoint: str) -> str:
    """Return the name of the task whose rows a checkpoint commits."""
    return PurePosixPath(checkpoint).name.removesuffix(_IDS)


def written_by(file: str) -> str:
    """Return the name of the task that wrote a Parquet file: the file's name without a number that is added to it."""
    return PurePosixPath(file).name.removesuffix(_IDS).rsplit("-", 1)[0]


class FileNames(FilenameProvider):  # type: ignore[misc]
    """Names of the Parquet files, none of which is a prefix of another.

    After a write task was cut off, Ray removes all files whose names begin with the task's. Ray's own names have six
    digits, so the name of task 100000 would be a prefix of that of task 1000000.

    Args:
        name: of the run.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, "parquet")

    def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
        """Return the prefix of the names of a task's files."""
        return f"{self.dataset_uuid}_{write_uuid}_{task_index:012}.{self.file_format}"


class RowFiles(ParquetDatasink):  # type: ignore[misc]
    """The Parquet files of a run, and beside their checkpoints a summary of the rows of each task.

    Args:
        output: of the run.
        checkpoint: URI of the folder of the checkpoints.
        rows_per_file: rows of a file, at least.
        max_ranked: number of the most anomalous images that a summary names.
    """

    def __init__(self, output: RunOutput, checkpoint: str, rows_per_file: int, max_ranked: int) -> None:
        filesystem, path = storage.arrow_filesystem(output.scores)
        super().__init__(
            path,
            filesystem=filesystem,
            partition_cols=["category"] if output.options.partition_by == "category" else None,
            filename_provider=FileNames(output.name),
            # Rows with raw maps are large.
            min_rows_per_file=min(rows_per_file, BLOCK_ROWS if output.options.raw_maps else sys.maxsize),
            arrow_parquet_args={"row_group_size": _ROW_GROUP_ROWS},
        )
        self._checkpoint = checkpoint
        self._max_ranked = max_ranked

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> None:
        """Write the rows of a task, and then their summary. The checkpoint is pending until both are written."""
        tables = [block for block in blocks if block.num_rows]
        name = self.filename_provider.get_filename_for_task(ctx.kwargs[_WRITE_UUID], ctx.task_idx)
        checkpoint = storage.join(self._checkpoint, name)
        # A task whose node was lost after its commit runs again. Its rows are complete: do not open their file again.
        if not tables or storage.exists(checkpoint):
            return
        super().write(tables, ctx)
        task = name.removesuffix(_IDS)
        summaries = (RowSummary.of_rows(table, task, self._max_ranked) for table in tables)
        storage.publish(summary_of(checkpoint), RowSummary.total(summaries, self._max_ranked).to_json())


class PendingCheckpointCleaner(CheckpointManager):  # type: ignore[misc]
    """Removes what unfinished write tasks left, as Ray does, but filters no rows: the input has only remaining ones."""

    def load_checkpoint(self, data_file_dir: Any = None, data_file_filesystem: Any = None) -> tuple[None, int]:
        """Clean up, and return no ids."""
        if data_file_dir is not None:
            self._clean_pending_checkpoints(data_file_dir, data_file_filesystem)
        return None, 0
