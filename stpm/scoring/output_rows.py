"""The rows that a run wrote. An error in reading them names the file at fault."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.dataset as ds

from stpm import storage
from stpm.errors import DataError, RunDamagedError
from stpm.scoring.output import RunOutput
from stpm.scoring.schema import OUTPUT

# Without this a category named 007 would be read as a number.
_HIVE = ds.partitioning(pa.schema([("category", pa.string())]), flavor="hive")


def open_rows(output: RunOutput, columns: Collection[str] = (), files: Sequence[str] | None = None) -> ds.Dataset:
    """Open the rows that the run wrote, or those in some of its files.

    Reads every file's footer now, and never again. Read the rows inside `blaming_damaged_file`: it turns pyarrow's
    errors into errors that name the file.

    Args:
        output: of the run.
        columns: that will be read.
        files: of the run; None: all.

    Raises:
        RunDamagedError: if the footer of a file is damaged, or it lacks a column or has one of another type.
    """
    filesystem, folder = storage.arrow_filesystem(output.scores)
    names = [uri.removeprefix(f"{output.scores}/") for uri in (output.files() if files is None else files)]
    with blaming_damaged_file(output, files):
        dataset = ds.dataset(
            [f"{folder}/{name}" for name in names],
            schema=None if names else OUTPUT,
            filesystem=filesystem,
            format="parquet",
            partitioning=_HIVE if any("/" in name for name in names) else None,
            partition_base_dir=folder,
        )
        # Arrow takes the first file's columns for those of all: it would read missing ones as null.
        problems = storage.in_parallel(lambda file: _find_problem(file, columns), dataset.get_fragments())
    for name, problem in zip(dataset.files, problems, strict=True):
        if problem:
            uri = storage.join(output.scores, name.removeprefix(f"{folder}/"))
            raise RunDamagedError(f"{uri} is not a file of rows: it has {problem}")
    return dataset


def read_batches(
    output: RunOutput, columns: Sequence[str], chosen: ds.Expression | None = None, batch_size: int = 131_072
) -> Iterator[pa.RecordBatch]:
    """Read columns of the rows that the run wrote, a batch at a time.

    Args:
        output: of the run.
        columns: to read.
        chosen: condition for rows; None: all.
        batch_size: rows of a batch, at most.

    Raises:
        RunDamagedError: if a file is damaged, or has other columns.
    """
    with blaming_damaged_file(output):
        yield from open_rows(output, columns).to_batches(list(columns), filter=chosen, batch_size=batch_size)


def check_row_count(output: RunOutput) -> None:
    """Compare the number of rows in the files with that of the run, if it is finished. Reads footers alone.

    Raises:
        RunDamagedError: if rows are missing or doubled, or a file is damaged.
    """
    state = output.state
    if not state.is_finished():
        return
    rows = state.result().rows
    with blaming_damaged_file(output):
        found = open_rows(output).count_rows()
    if found != rows:
        raise RunDamagedError(f"{found} rows in {output.scores}/{output.name}_*, where the run wrote {rows}")


@contextmanager
def blaming_damaged_file(output: RunOutput, files: Sequence[str] | None = None) -> Iterator[None]:
    """Turn pyarrow's errors, which seldom name the file, into errors that do.

    On an error, each of `files` (None: all of the run) is read again to find the damaged one.

    Raises:
        RunDamagedError: if a file of rows is damaged.
    """
    try:
        with storage.as_os_errors():
            yield
    except (pa.ArrowException, OSError) as failure:
        for uri in output.files() if files is None else files:
            try:
                storage.read_table(uri)
            except DataError as error:
                raise RunDamagedError(str(error)) from error
        if isinstance(failure, pa.ArrowException):
            reason = " ".join(str(failure).split())
            raise RunDamagedError(f"{output.scores}: a file of rows is damaged: {reason}") from failure
        raise


def _find_problem(file: ds.ParquetFileFragment, columns: Collection[str]) -> str:
    """Say which column a file of rows should have and has not, "" if none.

    Args:
        file: whose footer is read.
        columns: of OUTPUT that are needed; it needs those without nulls in any case.
    """
    schema, in_path = file.physical_schema, ds.get_partition_keys(file.partition_expression)
    for column in OUTPUT:
        index = schema.get_field_index(column.name)
        if index >= 0 and schema.field(index).type != column.type:
            return f"a column {column.name} of type {schema.field(index).type}, not {column.type}"
        if index < 0 and column.name not in in_path and (column.name in columns or not column.nullable):
            return f"no column {column.name}"
    return ""
