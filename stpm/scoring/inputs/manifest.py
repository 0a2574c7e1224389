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
from stpm.data.mvtec import Category
from stpm.errors import ConfigError, DataError
from stpm.scoring.inputs.archives import ImageRef
from stpm.scoring.schema import MANIFEST, passthrough, table, with_passthrough

_WHOLE = "manifest.json"
# A row group of a shard, and so the images that one decoding task takes.
BLOCK_ROWS = 64

# URI of a Parquet file, and the rows in it.
Shard = tuple[str, int]
# Kind of an image's error, and the same in words.
Error = tuple[str, str]
GOOD: Error = ("", "")


def image_id(uri: str) -> int:
    """A signed 64-bit hash of a URI: the image's config in all that is written."""
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


def new_rows(
    places: Sequence[ImageRef],
    categories: Sequence[str],
    labels: Sequence[str] = (),
    masks: Sequence[str] = (),
    errors: Sequence[Error] = (),
    own: pa.Table | None = None,
) -> pa.Table:
    """Rows of a manifest, without ids.

    Args:
        places: of the images.
        categories: "" where there is none, which is an error.
        labels: none: nothing is known of any.
        masks: the same.
        errors: what is known to be wrong with each, GOOD where it is nothing; none: with none of them.
        own: a table with the user's own columns.
    """
    found = [
        error if error != GOOD else _error(place, category)
        for place, category, error in zip(places, categories, errors or [GOOD] * len(places), strict=True)
    ]
    texts = {
        "uri": [place.uri for place in places],
        "category": categories,
        "label": labels or [""] * len(places),
        "mask": masks or [""] * len(places),
    }
    columns: dict[str, list[Any]] = {name: list(map(storage.as_utf8, values)) for name, values in texts.items()}
    columns |= {
        "image_id": [0] * len(places),
        "error_kind": [kind for kind, _ in found],
        "error_message": [message for _, message in found],
        "archive_start": [place.start for place in places],
        "archive_length": [place.length for place in places],
    }
    made = table(columns, MANIFEST)
    return made if own is None else with_passthrough(made, own)


def _error(place: ImageRef, category: str) -> Error:
    if place.uri != storage.as_utf8(place.uri):
        return "bad_name", "the name is not UTF-8, its bytes that are not are written %XX here; rename the file"
    if not category:
        return "no_model", "the image has no category; see --category and --category-from"
    return GOOD


def of_test_images(categories: Sequence[Category]) -> Iterator[pa.Table]:
    """The labelled test images of some categories, a table for each."""
    for category in categories:
        images = category.test
        yield new_rows(
            [ImageRef(image.uri) for image in images],
            [category.name] * len(images),
            [image.label for image in images],
            [image.mask for image in images],
        )


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
        for name in passthrough(chunk.schema):
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
        written.append((storage.join(folder, f"{len(written):06}.parquet"), passthrough(kept.schema)))
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
