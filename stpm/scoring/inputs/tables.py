"""Read a user's tables (Parquet, CSV, JSON lines) in chunks."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from stpm import storage
from stpm.errors import DataError
from stpm.scoring.inputs.archives import IMAGE_COLUMNS, PARQUET, image_column
from stpm.scoring.schema import INPUT_COLUMNS

SUFFIXES = (PARQUET, ".csv", ".jsonl", ".ndjson")
CHUNK_ROWS = 10_000


class Chunk(NamedTuple):
    """Rows of a table, without the images that it may hold. INPUT_COLUMNS hold text without nulls, or are missing."""

    table: pa.Table
    holds_images: bool


def read(uri: str) -> Iterator[Chunk]:
    """Read a table, at most `CHUNK_ROWS` rows at a time.

    All values of CSV and JSON lines are read as text, unchanged: 007 and 2024-01-01 do not become numbers and times. A
    column of a Parquet file keeps its type.

    Raises:
        DataError: if the table cannot be read, has no images and no URIs, or has two columns of one name.
    """
    chunks = _read_parquet(uri) if uri.lower().endswith(PARQUET) else _read_text(uri)
    names_images = False
    try:
        for table, holds_images in chunks:
            names = table.schema.names
            names_images = names_images or holds_images or "uri" in names
            if not names_images:
                raise DataError(
                    f"{uri}: no column `uri`, nor images in a column {' or '.join(IMAGE_COLUMNS)}; its columns are "
                    f"{', '.join(names)}"
                )
            yield Chunk(_with_text_columns(table), holds_images)
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"{uri}: this manifest cannot be read: {error}") from error


def input_values(table: pa.Table) -> Iterator[tuple[str, ...]]:
    """Return the values of INPUT_COLUMNS for each row, "" for a column that is missing."""
    missing = [""] * table.num_rows
    columns = [table[name].to_pylist() if name in table.schema.names else missing for name in INPUT_COLUMNS]
    return zip(*columns, strict=True)


def _with_text_columns(table: pa.Table) -> pa.Table:
    """Cast those of INPUT_COLUMNS that are there to text without nulls.

    Raises:
        pa.ArrowInvalid: if a string is not UTF-8.
    """
    table.validate(full=True)
    for name in INPUT_COLUMNS:
        if name in table.schema.names:
            texts = table[name].cast(pa.string()).fill_null("")
            table = table.set_column(table.schema.get_field_index(name), name, texts)
    return table


def _read_parquet(uri: str) -> Iterator[Chunk]:
    filesystem, path = storage.arrow_filesystem(uri)
    with filesystem.open_input_file(path) as file:
        parquet = pq.ParquetFile(file)
        schema = parquet.schema_arrow
        _require_distinct(schema.names)
        images = "" if "uri" in schema.names else image_column(schema)
        names = [name for name in schema.names if name != images]
        if names:
            batches = (pa.Table.from_batches([batch]) for batch in parquet.iter_batches(CHUNK_ROWS, columns=names))
        else:
            # Arrow's batches without columns do not know their number of rows.
            rows = parquet.metadata.num_rows
            sizes = (min(CHUNK_ROWS, rows - start) for start in range(0, rows, CHUNK_ROWS))
            batches = (pa.table({"uri": pa.nulls(size)}) for size in sizes)
        for table in batches:
            yield Chunk(table, bool(images))


def _read_text(uri: str) -> Iterator[Chunk]:
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as binary, io.TextIOWrapper(binary, "utf-8-sig", newline="") as file:
        records = _read_csv(file) if uri.lower().endswith(".csv") else _read_json_lines(file)
        while chunk := list(islice(records, CHUNK_ROWS)):
            names = dict.fromkeys(name for record in chunk for name in record)
            columns = {name: pa.array([record.get(name) for record in chunk], pa.string()) for name in names}
            yield Chunk(pa.table(columns), holds_images=False)


def _read_csv(file: TextIO) -> Iterator[dict[str, str | None]]:
    lines = csv.reader(file, strict=True)
    names = next(lines, [])
    _require_distinct(names)
    for values in lines:
        if values:
            if len(values) != len(names):
                raise ValueError(f"line {lines.line_num} has {len(values)} values for {len(names)} columns")
            yield dict(zip(names, values, strict=True))


def _read_json_lines(file: TextIO) -> Iterator[dict[str, str | None]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            # Numbers are kept as text: 1.50 and 12345678901234567890 would not survive parsing.
            values = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if type(values) is not dict:
            raise ValueError(f'line {number} is no object such as {{"uri": "a.png"}}')
        yield {name: _as_text(name, value, line) for name, value in values.items()}


def _as_text(name: str, value: Any, line: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(json.loads(line)[name], ensure_ascii=False)


def _require_distinct(names: Sequence[str]) -> None:
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two columns have the name {duplicates[0]}; rename one")
