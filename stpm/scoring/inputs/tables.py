"""Read a user's tables (Parquet, CSV, JSON lines), a part at a time."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stpm import storage
from stpm.data.decoding import SUFFIXES as IMAGE_SUFFIXES
from stpm.data.image_files import IMAGE_COLUMNS, PARQUET, image_column
from stpm.errors import DataError, NoImagesError
from stpm.names import is_utf8
from stpm.scoring.inputs.manifest import SHARD_ROWS
from stpm.scoring.schema import INPUT_COLUMNS

SUFFIXES = (PARQUET, ".csv", ".jsonl", ".ndjson")

# Columns of a stored listing of a bucket.
_LISTING_COLUMNS = ["bucket", "key"]
# Columns of a listing of a bucket with versions, and their values for the objects that are there.
_VERSION_COLUMNS = {"is_latest": True, "is_delete_marker": False}
# Keys of images.
_IMAGE = rf"({'|'.join(map(re.escape, IMAGE_SUFFIXES))})$"


def read(uri: str) -> Iterator[pa.Table]:
    """Read a table, at most SHARD_ROWS at a time. A table without a column `uri` has an image in each row.

    A stored listing of a bucket, as S3 Inventory writes, has columns `bucket` and `key` instead of `uri`. Those of its
    objects that are images are returned, and no other column. Older versions and deleted objects are left out.

    The images themselves are not read. INPUT_COLUMNS hold text without nulls, or are missing. All values of CSV and
    JSON lines are read as text, unchanged: 007 and 2024-01-01 do not become numbers and times. Other columns of a
    Parquet file keep their type.

    Raises:
        NoImagesError: if there is no such file.
        DataError: if the table cannot be read, has neither images nor URIs, or has two columns of one name.
    """
    try:
        with storage.as_os_errors():
            yield from map(_with_text, _read_parquet(uri) if uri.lower().endswith(PARQUET) else _read_text(uri))
    except FileNotFoundError as error:
        raise NoImagesError(f"{uri}: this table cannot be read: there is no such file") from error
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"{uri}: this table cannot be read: {error}") from error


def input_values(table: pa.Table) -> Iterator[tuple[str, ...]]:
    """Return the values of INPUT_COLUMNS for each row, "" for a column that is missing."""
    missing = [""] * table.num_rows
    columns = (table[name].to_pylist() if name in table.schema.names else missing for name in INPUT_COLUMNS)
    return zip(*columns, strict=True)


def _is_listing(names: Collection[str]) -> bool:
    return "uri" not in names and all(name in names for name in _LISTING_COLUMNS)


def _with_uris(listing: pa.Table, source: str) -> pa.Table:
    """Return the URIs of the images in a listing of a bucket, under the scheme of the listing itself, or s3."""
    listing.validate(full=True)
    scheme = "s3" if storage.is_local(source) else source.partition("://")[0]
    bucket, key = (listing[name].cast(pa.string()) for name in _LISTING_COLUMNS)
    uris = pc.binary_join_element_wise(f"{scheme}://", bucket, "/", key, "")
    is_image = pc.match_substring_regex(key, _IMAGE, ignore_case=True)
    for name, value in _VERSION_COLUMNS.items():
        if name in listing.schema.names:
            is_image = pc.and_(is_image, pc.equal(listing[name].cast(pa.bool_()).fill_null(value), value))
    return pa.table({"uri": uris.filter(is_image)})


def _with_text(table: pa.Table) -> pa.Table:
    """Cast the INPUT_COLUMNS of a table to text without nulls.

    Raises:
        pa.ArrowInvalid: if a string is not UTF-8.
    """
    table.validate(full=True)
    for number, name in enumerate(table.schema.names):
        if name in INPUT_COLUMNS:
            table = table.set_column(number, name, table[name].cast(pa.string()).fill_null(""))
    return table


def _read_parquet(uri: str) -> Iterator[pa.Table]:
    filesystem, path = storage.arrow_filesystem(uri)
    with filesystem.open_input_file(path) as file:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        _require_distinct(names)
        images = "" if "uri" in names else image_column(parquet.schema_arrow)
        if not images:
            _require_uri(uri, names)
        is_listing = not images and _is_listing(names)
        wanted = {*_LISTING_COLUMNS, *_VERSION_COLUMNS} if is_listing else {*names} - {images}
        for batch in parquet.iter_batches(SHARD_ROWS, columns=[name for name in names if name in wanted]):
            part = pa.Table.from_batches([batch])
            yield _with_uris(part, uri) if is_listing else part


def _read_text(uri: str) -> Iterator[pa.Table]:
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as binary, io.TextIOWrapper(binary, "utf-8-sig", newline="") as file:
        records = _read_csv(file) if uri.lower().endswith(".csv") else _read_json_lines(file)
        added: Sequence[str] = ()
        while some := list(islice(records, SHARD_ROWS)):
            names = dict.fromkeys(name for record in some for name in record)
            if not added:
                _require_uri(uri, names)
                added = _LISTING_COLUMNS if _is_listing(names) else ["uri"]
            names |= dict.fromkeys(added)
            part = pa.table({name: pa.array([record.get(name) for record in some], pa.string()) for name in names})
            yield _with_uris(part, uri) if added is _LISTING_COLUMNS else part


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
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from error
        if type(values) is not dict:
            raise ValueError(f'line {number} is not an object such as {{"uri": "a.png"}}')
        texts = {name: _as_text(name, value, line) for name, value in values.items()}
        if not all(text is None or is_utf8(text) for pair in texts.items() for text in pair):
            raise ValueError(f"line {number} has half of a surrogate pair (\\ud800 to \\udfff), which is no character")
        yield texts


def _as_text(name: str, value: Any, line: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(json.loads(line)[name], ensure_ascii=False)


def _require_distinct(names: Sequence[str]) -> None:
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two columns have the name {duplicates[0]}; rename one")


def _require_uri(table: str, names: Collection[str]) -> None:
    if "uri" not in names and not _is_listing(names):
        raise DataError(
            f"{table}: no column `uri`, nor images in a column {' or '.join(IMAGE_COLUMNS)}; its columns are "
            f"{', '.join(names)}"
        )
