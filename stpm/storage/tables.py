"""Stored Parquet files."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from stpm.errors import DataError
from stpm.storage.objects import read
from stpm.storage.retries import with_retries
from stpm.storage.uris import arrow_filesystem


def encode_parquet(table: pa.Table) -> bytes:
    """Encode a table as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def read_table(uri: str) -> pa.Table:
    """Read a Parquet file.

    Raises:
        DataError: if it is damaged. Otherwise as `read` does.
    """
    data = read(uri)
    try:
        # `pq.read_table` takes seven times as long for a small file.
        return pq.ParquetFile(pa.BufferReader(data)).read()
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise _damaged(uri, error) from error


def count_rows(uri: str) -> int:
    """Read the number of rows of a Parquet file from its footer.

    Raises:
        DataError: if it is damaged.
    """
    filesystem, path = arrow_filesystem(uri)
    try:
        return int(with_retries(uri, lambda: pq.read_metadata(path, filesystem=filesystem).num_rows))
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _damaged(uri, error) from error


def _damaged(uri: str, error: Exception) -> DataError:
    # A message of pyarrow may have several lines.
    return DataError(f"{uri} is damaged: {' '.join(str(error).split())}")
