"""Stored Parquet files."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from stpm.errors import DataError
from stpm.storage.objects import read


def encode_parquet(table: pa.Table, rows_per_group: int | None = None) -> bytes:
    """Encode a table as a Parquet file, in row groups of at most this many rows; None: of Arrow's default."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=rows_per_group)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def decode_parquet(data: bytes) -> pa.Table:
    """Decode a Parquet file. Raise what pyarrow raises if it is damaged."""
    # `pq.read_table` takes seven times as long for a small file. A thread that still holds the bytes when the
    # interpreter ends would abort the process (apache/arrow#34314).
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)


def read_table(uri: str) -> pa.Table:
    """Read a Parquet file.

    Raises:
        DataError: if it is damaged. Otherwise as `read` does.
    """
    data = read(uri)
    try:
        return decode_parquet(data)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        # A message of pyarrow may have several lines.
        raise DataError(f"{uri} is damaged: {' '.join(str(error).split())}") from error


def read_columns(uri: str, schema: pa.Schema) -> pa.Table:
    """Read a Parquet file that has these columns, and may have others.

    Raises:
        DataError: if it is damaged, or a column is missing, of another type, or null in a row.
    """
    rows = read_table(uri)
    for column in schema:
        index = rows.schema.get_field_index(column.name)
        if index < 0:
            raise DataError(f"{uri} has no column {column.name}")
        if rows.schema.field(index).type != column.type:
            raise DataError(f"{uri} has a column {column.name} of type {rows.schema.field(index).type}")
        if rows[index].null_count:
            raise DataError(f"{uri} has a row without {column.name}")
    return rows
