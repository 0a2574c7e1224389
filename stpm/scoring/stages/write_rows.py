"""Last stage: write rows as Parquet files, and then a summary of them, without which they do not count."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
from ray.data._internal.datasource.parquet_datasink import ParquetDatasink
from ray.data.datasource import FilenameProvider

from stpm import storage
from stpm.errors import RunInterruptedError
from stpm.lease import check
from stpm.scoring.inputs.manifest import BLOCK_ROWS
from stpm.scoring.options import OutputOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.row_summary import RowSummary, task_of

# The name under which Ray gives a write task the id of its execution.
_WRITE_UUID = "write_uuid"
# Maximum rows of a row group: to show an image's heatmap, one row group is read.
_ROW_GROUP_ROWS = 512


class RowWriter(ParquetDatasink):  # type: ignore[misc]
    """Write the rows of each task of a segment as Parquet files, and a summary of them.

    Args:
        output: of the run, with the attempt that writes.
        options: whether files hold raw maps.
        rows_per_file: minimum rows of a file.
    """

    def __init__(self, output: RunOutput, options: OutputOptions, segment: int, rows_per_file: int) -> None:
        filesystem, path = storage.arrow_filesystem(output.scores)
        super().__init__(
            path,
            filesystem=filesystem,
            filename_provider=FilenameProvider(f"{output.name}_{output.attempt:06}", "parquet"),
            # Rows with raw maps are large.
            min_rows_per_file=min(rows_per_file, BLOCK_ROWS if options.raw_maps else sys.maxsize),
            arrow_parquet_args={"row_group_size": _ROW_GROUP_ROWS},
        )
        self._output = output
        self._summaries = output.task_summaries(segment)

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> None:
        """Write the rows of a task, then their summary.

        Raises:
            RunInterruptedError: if another run has taken the lease; then the task leaves no rows.
        """
        tables = [block for block in blocks if block.num_rows]
        task = task_of(self.filename_provider.get_filename_for_task(ctx.kwargs[_WRITE_UUID], ctx.task_idx))
        # Ray repeats a task whose node was lost after it ended: keep the rows, which are complete.
        if not tables or storage.files_starting(self._summaries, f"{task}_"):
            return
        # An earlier try may be suspended, and go on later.
        self._try = uuid.uuid4().hex[:8]
        name = f"{task}_{self._try}"
        check(self._output.fence)
        super().write(tables, ctx)
        try:
            check(self._output.fence)
        except RunInterruptedError:
            # The run that holds the lease now may have ended, and removes no more files.
            for uri in self._output.files():
                if task_of(uri) == name:
                    storage.remove(uri)
            raise
        summary = RowSummary.total(RowSummary.of_rows(table, name) for table in tables)
        storage.publish(storage.join(self._summaries, f"{name}.json"), summary.to_json())

    def _get_basename_template(self, filename: str, write_uuid: str) -> str:
        template: str = super()._get_basename_template(filename, write_uuid)
        return template.replace("-{i}", f"_{self._try}-{{i}}")
