"""The manifest: the images of a run, each once, with the id that everything written names it by.

It is written in shards before scoring starts.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stpm import storage
from stpm.data.image_files import ImageRef
from stpm.data.mvtec import Category
from stpm.errors import ConfigError, DataError, ImageError, RunDamagedError
from stpm.lease import Fence, check
from stpm.names import as_utf8, is_utf8
from stpm.records import from_json, to_json
from stpm.scoring.options import ScoreOptions
from stpm.scoring.schema import MANIFEST, Int64Array, error_columns, table

_SUMMARY = "manifest.json"
_NO_CATEGORY = ImageError("no_model", "the image has no category; see --category and --category-from")
# Images of one decoding task.
BLOCK_ROWS = 64
# Rows of a file that is written and read whole: enough that there are few files, few enough that one is small.
SHARD_ROWS = 128 * BLOCK_ROWS
# Parts of all ids that are sorted one after the other: to sort them at once would take several times their memory.
_PARTS = 16
# Shards that are being written at the same time.
_WRITERS = 8


class ManifestRow(NamedTuple):
    """One image to score: `label`, `mask` and `roi` are "" if unknown, `error` says why it cannot be scored."""

    image: ImageRef
    category: str
    label: str = ""
    mask: str = ""
    roi: str = ""
    error: ImageError | None = None


def image_id(uri: str) -> int:
    """Hash a URI to a signed 64-bit integer, which identifies the image in everything that is written."""
    return int(_image_ids([uri])[0])


def _image_ids(uris: Sequence[str]) -> Int64Array:
    digests = b"".join([hashlib.blake2b(uri.encode(), digest_size=8).digest() for uri in uris])
    return np.frombuffer(digests, ">i8").astype(np.int64)


def make_rows(rows: Sequence[ManifestRow]) -> pa.Table:
    """Make a table of schema MANIFEST."""
    uris = [as_utf8(row.image.uri) for row in rows]
    texts = {name: [as_utf8(getattr(row, name)) for row in rows] for name in ("category", "label", "mask", "roi")}
    position = {
        "archive_start": [row.image.start for row in rows],
        "archive_length": [row.image.length for row in rows],
    }
    errors = error_columns([row.error or _error(row) for row in rows])
    return table({"image_id": _image_ids(uris), "uri": uris} | texts | errors | position, MANIFEST)


def _error(row: ManifestRow) -> ImageError | None:
    if not is_utf8(row.image.uri):
        return ImageError("bad_name", "the name is not UTF-8, bytes outside it are written %XX here; rename the file")
    return None if row.category else _NO_CATEGORY


def labelled_rows(categories: Sequence[Category]) -> Iterator[pa.Table]:
    """Yield a table of manifest rows for the labelled test images of each category."""
    for category in categories:
        yield make_rows(
            [
                ManifestRow(ImageRef(image.uri), category.name, image.label, image.mask, image.roi)
                for image in category.test
            ]
        )


class Shard(NamedTuple):
    """A Parquet file of the manifest, or its rows that are still to be scored.

    Args:
        rows: their number, without the written ones.
        written: sorted ids of the rows in it that are written; None if there are none.
    """

    uri: str
    rows: int
    written: Int64Array | None = None


class Segment(NamedTuple):
    """Consecutive shards of a manifest, which one execution of Ray Data scores."""

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
    """Write a manifest, without duplicates, as shards and, last of all, `manifest.json`, which makes it valid.

    Shards that an unfinished attempt left are removed first. Of several rows with one id the first is kept.

    Args:
        chunks: tables of schema MANIFEST, with the user's own columns.
        segment_rows: rows of a segment, at most.
        fence: of this process; None: it takes no lease.

    Raises:
        RunInterruptedError: if another run has taken the lease meanwhile.
        ConfigError: if a column of the user's has different types in different tables.
    """
    storage.remove(folder)
    categories: Counter[str] = Counter()
    ids = array("q")
    # Of all chunks until now, and those with which each shard was written.
    schema, schemas = MANIFEST, []
    ends = [0]

    def write(numbered: tuple[int, pa.Table]) -> int:
        number, rows = numbered
        uri = _shard_uri(folder, attempt, number)
        if rows.num_rows:
            # The user's columns that its source lacks, or has only nulls in, are null.
            rows = pa.concat_tables([schema.empty_table(), rows], promote_options="default")
            storage.publish(uri, storage.encode_parquet(rows))
        else:
            storage.remove(uri)
        return int(rows.num_rows)

    def read(number: int) -> pa.Table:
        return storage.read_table(_shard_uri(folder, attempt, number))

    def counted() -> Iterator[pa.Table]:
        nonlocal schema
        for chunk in chunks:
            ids.frombytes(chunk["image_id"].to_numpy().tobytes())
            categories.update(_count_categories(chunk))
            schema = _add_columns(schema, chunk.schema)
            yield chunk

    tables = enumerate(_cut(counted(), min(SHARD_ROWS, segment_rows)))
    while some := list(islice(tables, _WRITERS)):
        for rows in storage.in_parallel(write, some):
            ends.append(ends[-1] + rows)
            schemas.append(schema)
    shard_rows = [end - start for start, end in pairwise(ends)]
    is_repeated = _find_repeated(np.frombuffer(ids, np.int64))
    duplicates = (is_repeated[start:end] for start, end in pairwise(ends))
    written = zip(enumerate(schemas), duplicates, strict=True)
    incomplete = ((n, mask) for (n, known), mask in written if mask.any() or known != schema)
    while some_again := list(islice(incomplete, _WRITERS)):
        numbers = [number for number, _ in some_again]
        left = []
        for (number, mask), shard in zip(some_again, storage.in_parallel(read, numbers), strict=True):
            categories.subtract(_count_categories(shard.filter(pa.array(mask))))
            left.append((number, shard.filter(pa.array(~mask))))
        for number, rows in zip(numbers, storage.in_parallel(write, left), strict=True):
            shard_rows[number] = rows
    rows = sum(shard_rows)
    manifest = Manifest(rows, ends[-1] - rows, tuple(sorted(+categories)), tuple(shard_rows), segment_rows, attempt)
    check(fence)
    storage.publish(storage.join(folder, _SUMMARY), to_json(manifest, indent=None))
    return manifest


def _shard_uri(folder: str, attempt: int, number: int) -> str:
    return storage.join(folder, f"{attempt:06}-{number:06}.parquet")


def _count_categories(rows: pa.Table) -> dict[str, int]:
    counted: list[dict[str, Any]] = rows["category"].value_counts().to_pylist()
    return {each["values"]: each["counts"] for each in counted}


def _find_repeated(ids: Int64Array) -> npt.NDArray[np.bool_]:
    """Return whether each id is that of an earlier row, (N,)."""
    flags = np.zeros(len(ids), bool)
    # Ids are hashes: any of their bits split them evenly.
    part_of = (ids % _PARTS).astype(np.uint8)
    for part in range(_PARTS):
        rows = np.flatnonzero(part_of == part)
        rows = rows[np.argsort(ids[rows], kind="stable")]
        flags[rows[1:]] = ids[rows[1:]] == ids[rows[:-1]]
    return flags


def _add_columns(known: pa.Schema, schema: pa.Schema) -> pa.Schema:
    """Add the columns of a chunk to those known. Raise ConfigError if one has another type than before."""
    for field in schema:
        before = known.field(field.name).type if field.name in known.names else pa.null()
        if pa.null() not in (before, field.type) and before != field.type:
            raise ConfigError(
                f"column {field.name} is {before} in one table and {field.type} in another; give it one type"
            )
    return pa.unify_schemas([known, schema])


def _cut(chunks: Iterable[pa.Table], length: int) -> Iterator[pa.Table]:
    """Cut the rows of all chunks into tables of this length; the last one may be shorter."""
    waiting: list[pa.Table] = []
    for chunk in chunks:
        waiting.append(chunk)
        if sum(table.num_rows for table in waiting) >= length:
            rows = pa.concat_tables(waiting, promote_options="default")
            end = rows.num_rows - rows.num_rows % length
            yield from (rows.slice(start, length) for start in range(0, end, length))
            waiting = [rows.slice(end)]
    if any(table.num_rows for table in waiting):
        yield pa.concat_tables(waiting, promote_options="default")


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


def contains(ordered: Int64Array, ids: Int64Array) -> npt.NDArray[np.bool_]:
    """Return whether each id is in a sorted array."""
    if not len(ordered):
        return np.zeros(len(ids), bool)
    found: npt.NDArray[np.bool_] = ordered[np.minimum(np.searchsorted(ordered, ids), len(ordered) - 1)] == ids
    return found
