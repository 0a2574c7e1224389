"""Stored Parquet files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from stpm.storage.objects import read
from stpm.storage.retries import with_retries
from stpm.storage.uris import filesystem

T = TypeVar("T")


def parquet(table: pa.Table, row_group: int | None = None) -> bytes:
    """Encode a table as a Parquet file, in row groups of `row_group` rows."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=row_group)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def read_table(uri: str) -> pa.Table:
    """Read a Parquet file. Raises as `read` does."""
    return pq.read_table(pa.BufferReader(read(uri)))


def read_row_group(uri: str, number: int) -> pa.Table:
    """Read one row group of a Parquet file, without fetching the others. Raises as `read` does."""
    return _with_file(uri, lambda file: file.read_row_group(number))


def count_rows(uri: str) -> int:
    """Read the number of rows of a Parquet file, from its footer alone. Raises as `read` does."""
    return _with_file(uri, lambda file: int(file.metadata.num_rows))


def _with_file(uri: str, use: Callable[[pq.ParquetFile], T]) -> T:
    fs, path = filesystem(uri)

    def act() -> T:
        with fs.open(path) as file:
            return use(pq.ParquetFile(file))

    return with_retries(uri, act)
