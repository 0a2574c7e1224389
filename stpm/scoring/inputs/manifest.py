"""The manifest: the images of a run, each once, with the id that everything written names it by.

It is written in shards before scoring starts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

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
        categories: how many of the images each has, by name.
        segment_rows: rows of a segment, at most.
        attempt: number of the attempt that wrote it; what earlier ones wrote does not belong to it.
    """

    rows: int
    duplicates: int
    categories: dict[str, int]
    segment_rows: int = ScoreOptions.segment_rows
    attempt: int = 0

    def describe(self) -> str:
        return f"{self.rows} images{f', {self.duplicates} duplicates left out' if self.duplicates else ''}"

    def segments(self, folder: str) -> list[Segment]:
        """Divide the shards, which are in this folder, into segments."""
        length = min(SHARD_ROWS, self.segment_rows)
        in_segment = self.segment_rows // length
        shards = [
            Shard(_shard_uri(folder, self.attempt, number), min(length, self.rows - start))
            for number, start in enumerate(range(0, self.rows, length))
        ]
        starts = range(0, len(shards), in_segment)
        return [Segment(number, tuple(shards[start : start + in_segment])) for number, start in enumerate(starts)]


def write_manifest(
    chunks: Iterable[pa.Table],
    folder: str,
    segment_rows: int = ScoreOptions.segment_rows,
    attempt: int = 0,
    fence: Fence | None = None,
) -> Manifest:
    """Write a manifest, without duplicates, as shards and, last of all, `manifest.json`, which makes it valid.

    All shards but the last have one length. Those that an unfinished attempt left are removed first. Of several rows
    with one id the first is kept.

    Args:
        chunks: tables of schema MANIFEST, with the user's own columns.
        segment_rows: rows of a segment, at most.
        fence: of this process; None: it takes no lease.

    Raises:
        RunInterruptedError: if another run has taken the lease meanwhile.
        ConfigError: if a column of the user's has different types in different tables.
    """
    storage.remove(folder)
    seen, listed = _SeenIds(), 0
    categories: Counter[str] = Counter()
    # Of all chunks until now, and those with which each shard was written.
    schema, schemas = MANIFEST, []

    def write(numbered: tuple[int, pa.Table]) -> None:
        number, rows = numbered
        # The user's columns that its source lacks, or has only nulls in, are null.
        rows = pa.concat_tables([schema.empty_table(), rows], promote_options="default")
        storage.publish(_shard_uri(folder, attempt, number), storage.encode_parquet(rows))

    def write_again(number: int) -> None:
        write((number, storage.read_table(_shard_uri(folder, attempt, number))))

    def distinct() -> Iterator[pa.Table]:
        nonlocal schema, listed
        for chunk in chunks:
            rows = chunk.take(seen.add(chunk["image_id"].to_numpy()))
            for counted in rows["category"].value_counts().to_pylist():
                categories[counted["values"]] += counted["counts"]
            schema = _add_columns(schema, chunk.schema)
            listed += chunk.num_rows
            yield rows

    shards = enumerate(_cut(distinct(), min(SHARD_ROWS, segment_rows)))
    while some := list(islice(shards, _WRITERS)):
        storage.in_parallel(write, some)
        schemas += [schema] * len(some)
    storage.in_parallel(write_again, [n for n, known in enumerate(schemas) if known != schema], _WRITERS)
    rows = sum(categories.values())
    manifest = Manifest(rows, listed - rows, dict(sorted(categories.items())), segment_rows, attempt)
    check(fence)
    storage.publish(storage.join(folder, _SUMMARY), to_json(manifest, indent=None))
    return manifest


def _shard_uri(folder: str, attempt: int, number: int) -> str:
    return storage.join(folder, f"{attempt:06}-{number:06}.parquet")


class _SeenIds:
    """The ids of all images until now, in sorted arrays. Each is more than twice as long as the next: they are few."""

    def __init__(self) -> None:
        self._arrays: list[Int64Array] = []

    def add(self, ids: Int64Array) -> Int64Array:
        """Add ids, (N,); return the positions of those that are new, in order, of equal ones the first."""
        new, positions = np.unique(ids, return_index=True)
        for seen in self._arrays:
            is_new = ~contains(seen, new)
            new, positions = new[is_new], positions[is_new]
        self._arrays.append(new)
        while len(self._arrays) > 1 and len(self._arrays[-2]) <= 2 * len(self._arrays[-1]):
            merged = np.concatenate([self._arrays.pop(), self._arrays.pop()])
            # This one merges sorted parts in linear time.
            merged.sort(kind="stable")
            self._arrays.append(merged)
        return np.sort(positions)


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
    if manifest.rows != sum(manifest.categories.values()):
        raise RunDamagedError(f"{uri} is damaged, its categories do not add up to its {manifest.rows} rows")
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
