"""Tables of a user's own: Parquet, CSV and JSON lines, some thousand rows at a time."""

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
from stpm.scoring.schema import GIVEN

SUFFIXES = (PARQUET, ".csv", ".jsonl", ".ndjson")
CHUNK = 10_000


class Rows(NamedTuple):
    """Some rows of a table, without the images that they may hold; the columns GIVEN are strings, never null."""

    table: pa.Table
    hold_images: bool


def read(uri: str) -> Iterator[Rows]:
    """The rows of a table, at most `CHUNK` at a time.

    What CSV and JSON lines hold stays the text that it is: 007, 00123 and 2024-01-01 are no numbers and no times. A
    column of a Parquet file has the type that it has there.

    Raises:
        DataError: if it cannot be read, says nothing of images, or has two columns of one name.
    """
    rows = _parquet(uri) if uri.lower().endswith(PARQUET) else _text(uri)
    named = False
    try:
        for table, hold_images in rows:
            names = table.schema.names
            named = named or hold_images or "uri" in names
            if not named:
                raise DataError(
                    f"{uri}: no column `uri`, nor images in a column {' or '.join(IMAGE_COLUMNS)}; its columns are "
                    f"{', '.join(names)}"
                )
            yield Rows(_with_texts(table), hold_images)
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"{uri}: this manifest cannot be read: {error}") from error


def _with_texts(table: pa.Table) -> pa.Table:
    """The table with what is given as strings, and with a `uri`.

    Raises:
        pa.ArrowInvalid: if a string is not UTF-8.
    """
    table.validate(full=True)
    for name in GIVEN:
        if name in table.schema.names:
            texts = table[name].cast(pa.string()).fill_null("")
            table = table.set_column(table.schema.get_field_index(name), name, texts)
    if "uri" in table.schema.names:
        return table
    return table.append_column("uri", pa.array([""] * table.num_rows, pa.string()))


def _parquet(uri: str) -> Iterator[Rows]:
    filesystem, path = storage.arrow_filesystem(uri)
    with filesystem.open_input_file(path) as file:
        parquet = pq.ParquetFile(file)
        schema = parquet.schema_arrow
        _require_distinct(schema.names)
        held = "" if "uri" in schema.names else image_column(schema)
        names = [name for name in schema.names if name != held]
        if names:
            batches = (pa.Table.from_batches([batch]) for batch in parquet.iter_batches(CHUNK, columns=names))
        else:
            # Arrow's batches of no columns do not say how many rows there are.
            rows = parquet.metadata.num_rows
            batches = (pa.table({"uri": pa.nulls(min(CHUNK, rows - start))}) for start in range(0, rows, CHUNK))
        for table in batches:
            yield Rows(table, bool(held))


def _text(uri: str) -> Iterator[Rows]:
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as binary, io.TextIOWrapper(binary, "utf-8-sig", newline="") as file:
        records = _csv(file) if uri.lower().endswith(".csv") else _json_lines(file)
        while chunk := list(islice(records, CHUNK)):
            names = dict.fromkeys(name for record in chunk for name in record)
            columns = {name: pa.array([record.get(name) for record in chunk], pa.string()) for name in names}
            yield Rows(pa.table(columns), hold_images=False)


def _csv(file: TextIO) -> Iterator[dict[str, str | None]]:
    lines = csv.reader(file, strict=True)
    names = next(lines, [])
    _require_distinct(names)
    for values in lines:
        if values:
            if len(values) != len(names):
                raise ValueError(f"line {lines.line_num} has {len(values)} values for {len(names)} columns")
            yield dict(zip(names, values, strict=True))


def _json_lines(file: TextIO) -> Iterator[dict[str, str | None]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            # Numbers are not parsed, so that 1.50 and 12345678901234567890 stay what they are.
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
    if double := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two columns have the name {double[0]}; rename one")
