"""The manifest: the images of a run, each once, written in shards before scoring starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from stpm import storage
from stpm.errors import ConfigError, DataError, RunDamagedError
from stpm.lease import Fence, check
from stpm.records import from_json, to_json
from stpm.scoring.inputs.duplicates import DuplicateFinder
from stpm.scoring.options import ScoreOptions
from stpm.scoring.schema import MANIFEST, passthrough_columns

_SUMMARY = "manifest.json"
# Images of one decoding task.
BLOCK_ROWS = 64
# A shard is read at once, by one task: enough rows that few tasks need planning, few enough for a small file.
SHARD_ROWS = 128 * BLOCK_ROWS
# Shards that are being written at the same time.
_WRITERS = 8


class Shard(NamedTuple):
    """A Parquet file of the manifest, and the number of its rows."""

    uri: str
    rows: int


class Segment(NamedTuple):
    """Consecutive shards of a manifest, which are scored by one execution of Ray Data and committed together."""

    number: int
    shards: tuple[Shard, ...]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """The summary of a manifest.

    Args:
        rows: images in it.
        duplicates: images that were left out.
        categories: names, sorted.
        shard_rows: rows of each shard, by its number.
        segment_rows: rows of a segment, at most.
        attempt: number of the attempt that wrote it; what earlier ones wrote does not belong to it.
    """

    rows: int
    duplicates: int
    categories: tuple[str, ...]
    shard_rows: tuple[int, ...] = ()
    segment_rows: int = ScoreOptions.segment_rows
    attempt: int = 0

    def describe(self) -> str:
        return f"{self.rows} images{f', {self.duplicates} duplicates left out' if self.duplicates else ''}"

    def segments(self, folder: str) -> list[Segment]:
        """Divide the shards, which are in this folder, into segments."""
        segments: list[list[Shard]] = []
        rows_left = 0
        for number, rows in enumerate(self.shard_rows):
            if rows > rows_left:
                segments.append([])
                rows_left = self.segment_rows
            if rows:
                segments[-1].append(Shard(_shard_uri(folder, self.attempt, number), rows))
                rows_left -= rows
        return [Segment(number, tuple(shards)) for number, shards in enumerate(segments)]


def write_manifest(
    chunks: Iterable[pa.Table],
    folder: str,
    segment_rows: int = ScoreOptions.segment_rows,
    attempt: int = 0,
    fence: Fence | None = None,
) -> Manifest:
    """Write a manifest, without duplicates, as shards and, last of all, `manifest.json`: without it nothing counts.

    Shards that an unfinished attempt left are removed first. Of several rows with one id the first is kept.

    Args:
        chunks: tables of schema MANIFEST, with the user's own columns.
        folder: URI of the manifest's folder.
        segment_rows: rows of a segment, at most.
        attempt: number of the attempt that writes.
        fence: of this process; None: it takes no lease.

    Raises:
        CutOffError: if another run has taken the lease meanwhile.
        ConfigError: if a column of the user's has different types in different tables.
    """
    storage.remove(folder)
    categories: Counter[str] = Counter()
    with ThreadPoolExecutor(_WRITERS) as pool, DuplicateFinder() as ids:
        shards = _Shards(folder, attempt, min(SHARD_ROWS, segment_rows), pool)
        for chunk in chunks:
            ids.add(chunk["image_id"].to_numpy())
            categories.update(_count_categories(chunk))
            shards.add(chunk)
        shards.end()
        end = 0
        for number in range(len(shards)):
            start, end = end, end + shards.rows(number)
            is_duplicate = ids.mask(start, end)
            if is_duplicate.any() or shards.lacks_columns(number):
                shard = storage.read_table(_shard_uri(folder, attempt, number))
                categories.subtract(_count_categories(shard.filter(pa.array(is_duplicate))))
                shards.write(number, shard.filter(pa.array(~is_duplicate)))
        shard_rows = tuple(shards.rows(number) for number in range(len(shards)))
    rows = sum(shard_rows)
    manifest = Manifest(rows, end - rows, tuple(sorted(+categories)), shard_rows, segment_rows, attempt)
    check(fence)
    storage.publish(storage.join(folder, _SUMMARY), to_json(manifest, indent=None))
    return manifest


def _shard_uri(folder: str, attempt: int, number: int) -> str:
    return storage.join(folder, f"{attempt:06}-{number:06}.parquet")


def _count_categories(rows: pa.Table) -> dict[str, int]:
    counted: list[dict[str, Any]] = rows["category"].value_counts().to_pylist()
    return {each["values"]: each["counts"] for each in counted}


class _Written(NamedTuple):
    """A shard that is written: the number of its rows, and of the user's columns in it whose type is known."""

    rows: int
    user_columns: int


class _Shards:
    """Cut tables into shards of equal length, and write several of them at the same time.

    Args:
        folder: URI to write to.
        attempt: number of the attempt that writes.
        length: rows of each shard but the last.
        pool: of the threads that write.
    """

    def __init__(self, folder: str, attempt: int, length: int, pool: ThreadPoolExecutor) -> None:
        self._folder = folder
        self._attempt = attempt
        self._length = length
        self._pool = pool
        self._waiting: list[pa.Table] = []
        self._written: list[Future[_Written]] = []
        self._user_types: dict[str, pa.DataType] = {}

    def __len__(self) -> int:
        """Return the number of shards."""
        return len(self._written)

    def add(self, chunk: pa.Table) -> None:
        """Add rows. Raise ConfigError if a column of the user's has another type than before."""
        for name in passthrough_columns(chunk.schema):
            kind = chunk.schema.field(name).type
            known = self._user_types.get(name, pa.null())
            if pa.types.is_null(known):
                self._user_types[name] = kind
            elif kind not in (known, pa.null()):
                raise ConfigError(f"column {name} is {known} in one table and {kind} in another; give it one type")
        self._waiting.append(chunk)
        if sum(table.num_rows for table in self._waiting) >= self._length:
            rows = self._take()
            end = rows.num_rows - rows.num_rows % self._length
            for start in range(0, end, self._length):
                self.write(len(self), rows.slice(start, self._length))
            self._waiting = [rows.slice(end)]

    def end(self) -> None:
        """Write the rows that are left."""
        if any(table.num_rows for table in self._waiting):
            self.write(len(self), self._take())

    def write(self, number: int, rows: pa.Table) -> None:
        """Write the next shard, or replace an earlier one; without rows, remove it."""
        rows = _with_user_columns(rows, self._user_types)
        future = self._pool.submit(_write_shard, _shard_uri(self._folder, self._attempt, number), rows)
        self._written[number : number + 1] = [future]
        # Rows that wait for a writer take memory.
        self._written[max(number - 2 * _WRITERS, 0)].result()

    def rows(self, number: int) -> int:
        return self._written[number].result().rows

    def lacks_columns(self, number: int) -> bool:
        """Return whether a column of the user's was unknown, or its type, when the shard was written."""
        return self._written[number].result().user_columns < _count_known(self._user_types.values())

    def _take(self) -> pa.Table:
        rows = pa.concat_tables([_with_user_columns(table, self._user_types) for table in self._waiting])
        self._waiting = []
        return rows


def _write_shard(uri: str, rows: pa.Table) -> _Written:
    if rows.num_rows:
        storage.publish(uri, storage.encode_parquet(rows))
    else:
        storage.remove(uri)
    types = [rows.schema.field(name).type for name in passthrough_columns(rows.schema)]
    return _Written(rows.num_rows, _count_known(types))


def _count_known(types: Iterable[pa.DataType]) -> int:
    """Count types, without that of a column with nulls alone: other tables may know the column's type."""
    return sum(not pa.types.is_null(each) for each in types)


def _with_user_columns(rows: pa.Table, user_types: Mapping[str, pa.DataType]) -> pa.Table:
    """Give rows all of the user's columns, in one order: null where their source has none, or only nulls."""
    result = rows.select(MANIFEST.names)
    for name, kind in user_types.items():
        is_there = name in rows.schema.names and not pa.types.is_null(rows.schema.field(name).type)
        result = result.append_column(name, rows[name] if is_there else pa.nulls(rows.num_rows, kind))
    return result


def read_manifest(folder: str) -> Manifest | None:
    """Read the summary of a manifest, or return None if none was written to its end.

    Raises:
        RunDamagedError: if its `manifest.json` is damaged, or contradicts itself.
    """
    uri = storage.join(folder, _SUMMARY)
    try:
        manifest = from_json(Manifest, storage.read(uri))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunDamagedError(f"{uri} is damaged, and with it the list of this run's images ({error})") from error
    if manifest.rows != sum(manifest.shard_rows) or min(manifest.shard_rows, default=0) < 0:
        raise RunDamagedError(f"{uri} is damaged, its shards do not add up to its {manifest.rows} rows")
    if bool(manifest.rows) != bool(manifest.categories):
        raise RunDamagedError(
            f"{uri} is damaged, it has {manifest.rows} rows and {len(manifest.categories)} categories"
        )
    return manifest


def read_shard(uri: str) -> pa.Table:
    """Read the rows of a shard.

    Raises:
        RunDamagedError: if it is damaged or missing.
    """
    try:
        return storage.read_columns(uri, MANIFEST)
    except (DataError, FileNotFoundError) as error:
        raise RunDamagedError(f"{uri}, which lists images of this run, is damaged or missing ({error})") from error
