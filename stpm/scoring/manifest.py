"""The list of what is scored: fixed, in shards, before the work starts, each image in it once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stpm import storage
from stpm.errors import ConfigError, DataError
from stpm.mvtec import Category
from stpm.scoring.schema import MANIFEST, carried, table

_WHOLE = "manifest.json"
# A row group of a shard, and so the images that one decoding task takes.
BLOCK_ROWS = 64

# URI of a Parquet file, and the rows in it.
Shard = tuple[str, int]


def image_id(uri: str) -> int:
    """A signed 64-bit hash of a URI: the image's identity in all that is written."""
    return int.from_bytes(hashlib.blake2b(uri.encode(), digest_size=8).digest(), "big", signed=True)


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds: rows, doubles that were left out, categories, digest of all rows."""

    rows: int
    doubles: int
    categories: tuple[str, ...]
    digest: str

    def in_words(self) -> str:
        """How many images, and how many doubles."""
        return f"{self.rows} images{f', {self.doubles} doubles left out' if self.doubles else ''}"


def of_test_images(categories: Sequence[Category]) -> Iterator[pa.Table]:
    """The labelled test images of some categories, a table for each."""
    for category in categories:
        images = category.test
        columns: dict[str, list[Any]] = {
            "image_id": [0] * len(images),
            "uri": [image.uri for image in images],
            "category": [category.name] * len(images),
            "label": [image.label for image in images],
            "mask": [image.mask for image in images],
            "error_kind": [""] * len(images),
            "error_message": [""] * len(images),
            "archive_start": [0] * len(images),
            "archive_length": [-1] * len(images),
        }
        yield table(columns, MANIFEST)


def write(chunks: Iterable[pa.Table], folder: str) -> Manifest:
    """Write chunks of manifest rows as shards, with their ids and without doubles.

    What an earlier, unfinished attempt left is removed first. The folder counts once `manifest.json` is there.

    Args:
        chunks: tables of schema MANIFEST, with the user's own columns.
        folder: a URI.

    Raises:
        ConfigError: if a user's column has different types in different manifests.
    """
    storage.remove(folder)
    seen = SeenIds()
    rows = doubles = 0
    written: list[tuple[str, list[str]]] = []
    categories: set[str] = set()
    digest = hashlib.sha256()
    own: dict[str, pa.DataType] = {}
    for chunk in chunks:
        for name in carried(chunk.schema):
            kind = chunk.schema.field(name).type
            if own.setdefault(name, kind) != kind:
                raise ConfigError(f"column {name} is {own[name]} in one manifest and {kind} in another; make them one")
        ids = np.fromiter((image_id(uri) for uri in chunk["uri"].to_pylist()), np.int64, chunk.num_rows)
        new = seen.add(ids)
        doubles += int((~new).sum())
        kept = chunk.set_column(0, MANIFEST.field("image_id"), pa.array(ids)).filter(pa.array(new))
        if not kept.num_rows:
            continue
        data = storage.parquet(kept, BLOCK_ROWS)
        digest.update(data)
        written.append((storage.join(folder, f"{len(written):06}.parquet"), carried(kept.schema)))
        storage.publish(written[-1][0], data)
        rows += kept.num_rows
        categories.update(kept["category"].unique().to_pylist())
    for uri, names in written:
        if names != list(own):
            storage.publish(uri, storage.parquet(_with_columns(uri, own), BLOCK_ROWS))
    found = Manifest(rows, doubles, tuple(sorted(categories)), digest.hexdigest())
    storage.publish(storage.join(folder, _WHOLE), json.dumps(asdict(found), indent=2).encode())
    return found


def _with_columns(uri: str, own: dict[str, pa.DataType]) -> pa.Table:
    """A shard with every column of the user's, in one order: null where its source has none."""
    shard = storage.read_table(uri)
    result = shard.select(MANIFEST.names)
    for name, kind in own.items():
        known = name in shard.schema.names
        result = result.append_column(name, shard[name] if known else pa.nulls(shard.num_rows, kind))
    return result


def read(folder: str) -> Manifest | None:
    """What a folder holds, or None if no attempt to write it was finished.

    Raises:
        DataError: if its `manifest.json` is damaged.
    """
    uri = storage.join(folder, _WHOLE)
    try:
        values = json.loads(storage.read(uri))
        return Manifest(**values | {"categories": tuple(values["categories"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{uri} is damaged, and with it the list of this pass's images ({error}); give another --out, or --fresh"
        ) from error


def shards(folder: str) -> list[str]:
    """URIs of the shards."""
    return [uri for uri, _ in storage.files(folder) if uri.endswith(".parquet")]


class SeenIds:
    """A growing set of ids, at eight bytes each: sorted arrays, each at least twice as long as the next."""

    def __init__(self) -> None:
        self._runs: list[npt.NDArray[np.int64]] = []

    def add(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of these were not in the set, the first of equals only; they are now."""
        new = np.zeros(len(ids), bool)
        distinct, first = np.unique(ids, return_index=True)
        fresh = ~np.logical_or.reduce([_holds(run, distinct) for run in self._runs] or [np.zeros(len(distinct), bool)])
        new[first[fresh]] = True
        self._runs.append(distinct[fresh])
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            last, before = self._runs.pop(), self._runs.pop()
            self._runs.append(np.sort(np.concatenate([before, last])))
        return new


def _holds(ordered: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    if not len(ordered):
        return np.zeros(len(ids), bool)
    places = np.minimum(np.searchsorted(ordered, ids), len(ordered) - 1)
    found: npt.NDArray[np.bool_] = ordered[places] == ids
    return found
