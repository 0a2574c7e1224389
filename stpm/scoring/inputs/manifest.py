"""The manifest: the images of a run, each once, written in shards before scoring starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stpm import storage
from stpm.data.mvtec import Category
from stpm.errors import ConfigError, DataError, ImageError
from stpm.scoring.inputs.archives import ImageRef
from stpm.scoring.schema import MANIFEST, passthrough_columns, table, with_passthrough

_SUMMARY = "manifest.json"
# Rows of a shard's row group, and so images of one decoding task.
BLOCK_ROWS = 64

# URI of a Parquet file, and the number of its rows.
Shard = tuple[str, int]


class ManifestRow(NamedTuple):
    """One image to score: `label` and `mask` are "" if unknown, `error` says why it cannot be scored."""

    image: ImageRef
    category: str
    label: str = ""
    mask: str = ""
    error: ImageError | None = None


@dataclass(frozen=True)
class Manifest:
    """The summary of a manifest: rows, duplicates that were left out, categories, SHA-256 of all rows."""

    rows: int
    duplicates: int
    categories: tuple[str, ...]
    digest: str

    def describe(self) -> str:
        return f"{self.rows} images{f', {self.duplicates} duplicates left out' if self.duplicates else ''}"


def image_id(uri: str) -> int:
    """Hash a URI to a signed 64-bit integer, which identifies the image in everything that is written."""
    return int.from_bytes(hashlib.blake2b(uri.encode(), digest_size=8).digest(), "big", signed=True)


def make_rows(rows: Sequence[ManifestRow], user_table: pa.Table | None = None) -> pa.Table:
    """Make a table of schema MANIFEST, with the user's own columns of the table that the rows were read from."""
    uris = [storage.as_utf8(row.image.uri) for row in rows]
    errors = [row.error or _error(row) for row in rows]
    columns = {
        "image_id": [image_id(uri) for uri in uris],
        "uri": uris,
        "category": [storage.as_utf8(row.category) for row in rows],
        "label": [storage.as_utf8(row.label) for row in rows],
        "mask": [storage.as_utf8(row.mask) for row in rows],
        "error_kind": [error.kind if error else "" for error in errors],
        "error_message": [str(error) if error else "" for error in errors],
        "archive_start": [row.image.start for row in rows],
        "archive_length": [row.image.length for row in rows],
    }
    made = table(columns, MANIFEST)
    return made if user_table is None else with_passthrough(made, user_table)


def _error(row: ManifestRow) -> ImageError | None:
    if not storage.is_utf8(row.image.uri):
        return ImageError("bad_name", "the name is not UTF-8, bytes outside it are written %XX here; rename the file")
    if not row.category:
        return ImageError("no_model", "the image has no category; see --category and --category-from")
    return None


def labelled_rows(categories: Sequence[Category]) -> Iterator[pa.Table]:
    """Yield a table of manifest rows for the labelled test images of each category."""
    for category in categories:
        yield make_rows(
            [ManifestRow(ImageRef(image.uri), category.name, image.label, image.mask) for image in category.test]
        )


def write(chunks: Iterable[pa.Table], folder: str) -> Manifest:
    """Write a manifest, without duplicates, as shards and, last of all, `manifest.json`: without it nothing counts.

    Shards that an unfinished attempt left are removed first.

    Args:
        chunks: tables of schema MANIFEST, with the user's own columns.
        folder: URI of the manifest's folder.

    Raises:
        ConfigError: if a column of the user's has different types in different tables.
    """
    storage.remove(folder)
    seen = SeenIds()
    rows = duplicates = 0
    written: list[tuple[str, list[str]]] = []
    categories: set[str] = set()
    digest = hashlib.sha256()
    user_types: dict[str, pa.DataType] = {}
    for chunk in chunks:
        _add_types(user_types, chunk.schema)
        is_new = seen.add(chunk["image_id"].to_numpy())
        kept = chunk.filter(pa.array(is_new))
        duplicates += chunk.num_rows - kept.num_rows
        if not kept.num_rows:
            continue
        data = storage.parquet(kept, BLOCK_ROWS)
        digest.update(data)
        written.append((storage.join(folder, f"{len(written):06}.parquet"), passthrough_columns(kept.schema)))
        storage.publish(written[-1][0], data)
        rows += kept.num_rows
        categories.update(kept["category"].unique().to_pylist())
    for uri, names in written:
        if names != list(user_types):
            storage.publish(uri, storage.parquet(_with_user_columns(uri, user_types), BLOCK_ROWS))
    summary = Manifest(rows, duplicates, tuple(sorted(categories)), digest.hexdigest())
    storage.publish(storage.join(folder, _SUMMARY), json.dumps(asdict(summary), indent=2).encode())
    return summary


def _add_types(user_types: dict[str, pa.DataType], schema: pa.Schema) -> None:
    """Add the types of the user's columns in one more table. Raise ConfigError if one differs from before."""
    for name in passthrough_columns(schema):
        kind = schema.field(name).type
        if (known := user_types.setdefault(name, kind)) != kind:
            raise ConfigError(f"column {name} is {known} in one manifest and {kind} in another; give it one type")


def _with_user_columns(uri: str, user_types: dict[str, pa.DataType]) -> pa.Table:
    """Read a shard and give it all of the user's columns, in one order: null where its source has none."""
    shard = storage.read_table(uri)
    result = shard.select(MANIFEST.names)
    for name, kind in user_types.items():
        is_there = name in shard.schema.names
        result = result.append_column(name, shard[name] if is_there else pa.nulls(shard.num_rows, kind))
    return result


def read(folder: str) -> Manifest | None:
    """Read the summary of a manifest, or return None if none was written to its end.

    Raises:
        DataError: if its `manifest.json` is damaged.
    """
    uri = storage.join(folder, _SUMMARY)
    try:
        values = json.loads(storage.read(uri))
        return Manifest(**values | {"categories": tuple(values["categories"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{uri} is damaged, and with it the list of this run's images ({error}); give another --out, or --fresh"
        ) from error


def shards(folder: str) -> list[str]:
    """Return the URIs of a manifest's shards."""
    return [uri for uri, _ in storage.files(folder) if uri.endswith(".parquet")]


class SeenIds:
    """A growing set of ids, at eight bytes each: sorted arrays, each at least twice as long as the next."""

    def __init__(self) -> None:
        self._arrays: list[npt.NDArray[np.int64]] = []

    def add(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Add ids. Return a mask of those that were not in the set, and of equal ones only the first."""
        is_new = np.zeros(len(ids), bool)
        distinct, first = np.unique(ids, return_index=True)
        unseen = np.ones(len(distinct), bool)
        for array in self._arrays:
            unseen &= ~_contains(array, distinct)
        is_new[first[unseen]] = True
        self._arrays.append(distinct[unseen])
        while len(self._arrays) > 1 and len(self._arrays[-2]) < 2 * len(self._arrays[-1]):
            last, before = self._arrays.pop(), self._arrays.pop()
            self._arrays.append(np.sort(np.concatenate([before, last])))
        return is_new


def _contains(ordered: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    if not len(ordered):
        return np.zeros(len(ids), bool)
    positions = np.minimum(np.searchsorted(ordered, ids), len(ordered) - 1)
    found: npt.NDArray[np.bool_] = ordered[positions] == ids
    return found
