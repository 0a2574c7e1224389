"""The rows that a run wrote. An error in reading them names the file at fault."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from stpm import storage
from stpm.errors import DataError, RunDamagedError
from stpm.scoring.output import RunOutput
from stpm.scoring.schema import OUTPUT, Int64Array

_FILES_AT_ONCE = 256


def open_rows(output: RunOutput, columns: Collection[str] = (), files: Sequence[str] | None = None) -> ds.Dataset:
    """Open the rows that the run wrote, or those in some of its files, to read these columns and any that have no null.

    Reads every file's footer now, and never again. Read the rows inside `naming_damaged_file`.

    Raises:
        RunDamagedError: if the footer of a file is damaged, or it lacks a column or has one of another type.
    """
    filesystem, folder = storage.arrow_filesystem(output.scores)
    names = [uri.removeprefix(f"{output.scores}/") for uri in (output.files() if files is None else files)]
    with naming_damaged_file(output, files):
        dataset = ds.dataset(
            [f"{folder}/{name}" for name in names],
            schema=None if names else OUTPUT,
            filesystem=filesystem,
            format="parquet",
        )
        # Arrow takes the first file's columns for those of all: it would read missing ones as null.
        problems = storage.in_parallel(lambda file: _find_problem(file, columns), dataset.get_fragments())
    for name, problem in zip(dataset.files, problems, strict=True):
        if problem:
            uri = storage.join(output.scores, name.removeprefix(f"{folder}/"))
            raise RunDamagedError(f"{uri} is not a file of rows: it has {problem}")
    return dataset


def read_batches(
    output: RunOutput,
    columns: Sequence[str],
    chosen: ds.Expression | None = None,
    batch_size: int = 131_072,
    files: Sequence[str] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Read columns of the rows that the run wrote, and that fulfil a condition, at most `batch_size` at a time.

    Args:
        files: of the run, to read no others.

    Raises:
        RunDamagedError: if a file is damaged, or has other columns.
    """
    with naming_damaged_file(output, files):
        for dataset in _open_some(output, files, columns):
            yield from dataset.to_batches(list(columns), filter=chosen, batch_size=batch_size)


def row_reader(output: RunOutput) -> pa.RecordBatchReader:
    """Return a reader of all rows that the run wrote, without columns of bytes; it raises as `read_batches` does."""
    fields = [field for field in open_rows(output).schema if field.type not in (pa.binary(), pa.large_binary())]
    schema = pa.schema(fields).remove_metadata()
    return pa.RecordBatchReader.from_batches(schema, read_batches(output, schema.names))


def count_rows(output: RunOutput, files: Sequence[str] | None = None) -> int:
    """Count the rows that the run wrote, or those in some of its files, from the footers alone.

    Raises:
        RunDamagedError: if a file is damaged.
    """
    with naming_damaged_file(output, files):
        return sum(dataset.count_rows() for dataset in _open_some(output, files))


def read_ids(output: RunOutput, files: Sequence[str]) -> Int64Array:
    """Read the ids of the images in some files of rows, sorted.

    Raises:
        RunDamagedError: if a file is damaged.
    """
    ids = [batch["image_id"].to_numpy() for batch in read_batches(output, ["image_id"], files=files)]
    return np.sort(np.concatenate([np.empty(0, np.int64), *ids]))


def _open_some(output: RunOutput, files: Sequence[str] | None, columns: Collection[str] = ()) -> Iterator[ds.Dataset]:
    """Open some files at a time: a dataset keeps each file's footer, which takes more memory than the file's ids."""
    found = output.files() if files is None else files
    for start in range(0, len(found), _FILES_AT_ONCE):
        yield open_rows(output, columns, found[start : start + _FILES_AT_ONCE])


def check_row_count(output: RunOutput) -> None:
    """Compare the number of rows in the files with that of the run, if it is finished.

    Raises:
        RunDamagedError: if rows are missing or doubled, or a file is damaged.
    """
    state = output.state
    if state.is_finished() and (found := count_rows(output)) != (rows := state.result().rows):
        raise RunDamagedError(f"{found} rows in {output.scores}/{output.name}_*, where the run wrote {rows}")


@contextmanager
def naming_damaged_file(output: RunOutput, files: Sequence[str] | None = None) -> Iterator[None]:
    """Turn pyarrow's errors in the block, which seldom name the file, into errors that do.

    After an error, read each of `files` (None: all of the run) again to find the damaged one.

    Raises:
        RunDamagedError: if a file of rows is damaged or missing.
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
            except FileNotFoundError as error:
                raise RunDamagedError(f"{uri} is missing, and with it rows of this run") from error
        if isinstance(failure, pa.ArrowException):
            reason = " ".join(str(failure).split())
            raise RunDamagedError(f"{output.scores}: a file of rows is damaged: {reason}") from failure
        raise


def _find_problem(file: ds.ParquetFileFragment, columns: Collection[str]) -> str:
    """Say which column a file of rows should have and has not, "" if none: of OUTPUT, these and those without nulls."""
    schema = file.physical_schema
    for column in OUTPUT:
        index = schema.get_field_index(column.name)
        if index >= 0 and schema.field(index).type != column.type:
            return f"a column {column.name} of type {schema.field(index).type}, not {column.type}"
        if index < 0 and (column.name in columns or not column.nullable):
            return f"no column {column.name}"
    return ""
