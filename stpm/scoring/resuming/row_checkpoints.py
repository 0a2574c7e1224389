"""Ray Data's row checkpoints: files with the ids of the written rows, so that a killed run can be resumed.

A task that writes rows makes one checkpoint. It writes their ids to a file with a pending name, then the rows, then
their summary, and commits all of them by renaming the file of ids. The next run removes what a killed task left.

Every task imports this module to read its configuration: no torch here.
"""

from __future__ import annotations

import re
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
from stpm.scoring.options import OutputOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.row_summary import RowSummary

_PENDING = ".pending.parquet"
_IDS = ".parquet"
_SUMMARY = ".json"
# The name under which Ray gives a write task the id of its execution.
_WRITE_UUID = "write_uuid"
# Ray adds it to the task's name in the name of a file of rows.
_FILE_NUMBER = re.compile(r"-\d+$")
# Maximum rows of a row group: to show an image's heatmap, one row group is read.
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

    Ray commits a checkpoint by renaming it. A store without renames copies the file and removes the original. If this
    was cut off, both names exist and the rows are written: remove the pending one.
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


def task_of(uri: str) -> str:
    """Return the name of the task that wrote a checkpoint, or a file of rows, to whose name Ray adds a number."""
    return _FILE_NUMBER.sub("", PurePosixPath(uri).name.removesuffix(_IDS))


class FileNames(FilenameProvider):  # type: ignore[misc]
    """Name tasks so that no name is a prefix of another: in twelve digits.

    Ray removes the files whose names begin with that of a killed task. In Ray's own names, of six digits, that of task
    100000 is a prefix of that of task 1000000.

    Args:
        name: of the run.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, "parquet")

    def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
        """Return the prefix of the names of a task's files."""
        return f"{self.dataset_uuid}_{write_uuid}_{task_index:012}.{self.file_format}"


class RowWriter(ParquetDatasink):  # type: ignore[misc]
    """Write the rows of each task as Parquet files, and a summary of them beside the task's checkpoint.

    Args:
        output: of the run.
        options: whether files are divided by category, and hold raw maps.
        checkpoints: URI of the folder of the checkpoints.
        rows_per_file: minimum rows of a file.
        max_ranked: number of the most anomalous images that a summary names.
    """

    def __init__(
        self, output: RunOutput, options: OutputOptions, checkpoints: str, rows_per_file: int, max_ranked: int
    ) -> None:
        filesystem, path = storage.arrow_filesystem(output.scores)
        super().__init__(
            path,
            filesystem=filesystem,
            partition_cols=["category"] if options.partition_by == "category" else None,
            filename_provider=FileNames(output.name),
            # Rows with raw maps are large.
            min_rows_per_file=min(rows_per_file, BLOCK_ROWS if options.raw_maps else sys.maxsize),
            arrow_parquet_args={"row_group_size": _ROW_GROUP_ROWS},
        )
        self._checkpoints = checkpoints
        self._max_ranked = max_ranked

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> None:
        """Write the rows of a task, then their summary. Ray commits the checkpoint after that."""
        tables = [block for block in blocks if block.num_rows]
        name = self.filename_provider.get_filename_for_task(ctx.kwargs[_WRITE_UUID], ctx.task_idx)
        checkpoint = storage.join(self._checkpoints, name)
        # Ray repeats a task whose node was lost after the commit: keep the rows, which are complete.
        if not tables or storage.exists(checkpoint):
            return
        super().write(tables, ctx)
        summaries = (RowSummary.of_rows(table, task_of(name), self._max_ranked) for table in tables)
        storage.publish(summary_of(checkpoint), RowSummary.total(summaries, self._max_ranked).to_json())


class PendingCheckpointCleaner(CheckpointManager):  # type: ignore[misc]
    """Remove what killed tasks left, as Ray does, and filter no rows: the input has only those that remain."""

    def load_checkpoint(self, data_file_dir: Any = None, data_file_filesystem: Any = None) -> tuple[None, int]:
        """Clean up, and return no ids."""
        if data_file_dir is not None:
            self._clean_pending_checkpoints(data_file_dir, data_file_filesystem)
        return None, 0
