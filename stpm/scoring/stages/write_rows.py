"""Last stage: write rows as Parquet files, and then a summary of them, without which they do not count."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterable

import pyarrow as pa
from ray.data._internal.execution.interfaces import TaskContext
from ray.data.datasource import Datasink

from stpm import storage
from stpm.errors import RunInterruptedError
from stpm.lease import check
from stpm.scoring.inputs.manifest import BLOCK_ROWS
from stpm.scoring.options import OutputOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.row_summary import RowSummary

# Maximum rows of a row group: to show an image's heatmap, one row group is read.
_ROW_GROUP_ROWS = 512


class RowWriter(Datasink):  # type: ignore[misc]
    """Write the rows of each task of a segment as a Parquet file, and a summary of them.

    Args:
        output: of the run, with the attempt that writes.
        options: whether files hold raw maps.
        rows_per_file: minimum rows of a file.
    """

    def __init__(self, output: RunOutput, options: OutputOptions, segment: int, rows_per_file: int) -> None:
        self._output = output
        self._summaries = output.task_summaries(segment)
        # Rows with raw maps are large.
        self._rows_per_file = min(rows_per_file, BLOCK_ROWS if options.raw_maps else sys.maxsize)
        # Names the execution: the driver makes this object, and all tasks get copies.
        self._execution = uuid.uuid4().hex

    @property
    def min_rows_per_write(self) -> int:
        """The minimum rows that Ray gives to a task."""
        return self._rows_per_file

    def write(self, blocks: Iterable[pa.Table], ctx: TaskContext) -> None:
        """Write the rows of a task, then their summary.

        Raises:
            RunInterruptedError: if another run has taken the lease; then the task leaves no rows.
        """
        tables = [block for block in blocks if block.num_rows]
        if not tables:
            return
        task = f"{self._output.name}_{self._output.attempt:06}_{self._execution}_{ctx.task_idx:06}"
        # Ray repeats a task whose node was lost, and an earlier try may go on: each has a name, and one of them counts.
        name = f"{task}_{uuid.uuid4().hex[:8]}"
        (uri,) = self._output.files_of([name])
        rows = pa.concat_tables(tables, promote_options="default")
        check(self._output.fence)
        # The run syncs all files at its end.
        storage.publish(uri, storage.encode_parquet(rows, _ROW_GROUP_ROWS), durable=False)
        try:
            check(self._output.fence)
        except RunInterruptedError:
            # The run that holds the lease now may have ended, and removes no more files.
            storage.remove(uri)
            raise
        summary = RowSummary.of_rows(rows, name)
        storage.publish(storage.join(self._summaries, f"{name}.json"), summary.to_json())
