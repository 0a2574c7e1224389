"""Where images come from: folders, globs, archives, manifests, lists; as manifest rows, a chunk at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from stpm import storage
from stpm.errors import ConfigError, DataError
from stpm.images import SUFFIXES
from stpm.scoring.archives import IMAGE_COLUMNS, PARQUET, TAR, Place, image_column, members, row_of
from stpm.scoring.categories import Categories
from stpm.scoring.schema import MANIFEST, table, taken, with_carried

STANDARD_INPUT = "-"
CHUNK = 10_000

_MANIFESTS = (".parquet", ".csv", ".jsonl", ".ndjson")
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Allowed:
    """What URIs of a manifest may name: a manifest is foreign data, and must not make a job read its host's files.

    Args:
        prefixes: URIs that are allowed, with all that is under them.
    """

    prefixes: tuple[str, ...]

    @classmethod
    def by(cls, manifest: str, prefixes: Sequence[str]) -> Allowed:
        """The given prefixes, or else the bucket of the manifest, or its folder if it is a local file."""
        if prefixes:
            return cls(tuple(storage.absolute(prefix) for prefix in prefixes))
        if storage.is_local(manifest):
            return cls((str(Path(storage.absolute(manifest)).parent),))
        scheme, _, path = manifest.partition("://")
        return cls((f"{scheme}://{path.split('/', 1)[0]}",))

    def refusal(self, uri: str) -> str:
        """Why a URI may not be read, or "" if it may."""
        if "::" in uri or ".." in uri.split("/") or not any(_under(uri, prefix) for prefix in self.prefixes):
            return f"the manifest may name only what is under {', '.join(self.prefixes)}; see --allow"
        return ""


def _under(uri: str, prefix: str) -> bool:
    return uri == prefix or uri.startswith(f"{prefix.rstrip('/')}/")


def rows_of(
    sources: Sequence[str], categories: Categories, allow: Sequence[str] = (), lines: Iterable[str] = ()
) -> Iterator[pa.Table]:
    """Manifest rows of several sources, at most `CHUNK` at a time; ids are not yet there, nor doubles found.

    Args:
        sources: folders, prefixes, globs, tar archives, manifests (Parquet, CSV, JSON lines), Parquet files that hold
            the images themselves, or `-` for a list of URIs. A glob may end in any of these.
        categories: for images whose manifest does not name one.
        allow: prefixes that a manifest's URIs may have, if not those of the manifest itself.
        lines: the list, a URI per line.

    Raises:
        DataError: if a source has no image, or a manifest or an archive cannot be read.
        ConfigError: if a manifest has a column that scoring writes itself.
    """
    for source in sources:
        uri = source if source == STANDARD_INPUT else storage.absolute(source)
        globbed = storage.glob(uri) if _GLOB.search(uri) else None
        if uri.lower().endswith(_MANIFESTS):
            for table in [uri] if globbed is None else globbed:
                yield from _of_table(table, categories, Allowed.by(table, allow))
            continue
        found = False
        for places in _chunks(_listed(uri, globbed, lines)):
            found = True
            yield _table(places, [categories.of(place.path) for place in places], [""] * len(places))
        if not found:
            raise DataError(f"{source}: no images here (of {', '.join(SUFFIXES)}, or in {TAR})")


def _listed(uri: str, globbed: Sequence[str] | None, lines: Iterable[str]) -> Iterator[Place]:
    if uri == STANDARD_INPUT:
        yield from (Place(storage.absolute(line.strip())) for line in lines if line.strip())
        return
    for name in storage.stream(uri) if globbed is None else globbed:
        if name.lower().endswith(SUFFIXES):
            yield Place(name)
        elif name.endswith(TAR):
            yield from members(name)


def _chunks(places: Iterator[Place]) -> Iterator[list[Place]]:
    while chunk := list(islice(places, CHUNK)):
        yield chunk


def _table(places: list[Place], categories: list[str], refusals: list[str], known: pa.Table | None = None) -> pa.Table:
    """Rows with a category and no refusal are good; `known` gives labels, masks and the user's own columns."""
    kinds, messages = [], []
    for category, refusal in zip(categories, refusals, strict=True):
        if refusal:
            kinds.append("not_allowed")
            messages.append(refusal)
        else:
            kinds.append("" if category else "no_model")
            messages.append("" if category else "the image has no category; see --category and --category-from")
    uris = [place.uri for place in places]
    known = pa.table({"uri": uris}) if known is None else known
    columns: dict[str, list[Any]] = {
        "image_id": [0] * len(uris),
        "uri": uris,
        "category": categories,
        "label": _texts(known, "label") or [""] * len(uris),
        "mask": _texts(known, "mask") or [""] * len(uris),
        "error_kind": kinds,
        "error_message": messages,
        "archive_start": [place.start for place in places],
        "archive_length": [place.length for place in places],
    }
    return with_carried(table(columns, MANIFEST), known)


def _texts(rows: pa.Table, name: str) -> list[str]:
    if name not in rows.schema.names:
        return []
    return [value or "" for value in rows[name].cast(pa.string()).to_pylist()]


def _of_table(uri: str, categories: Categories, allowed: Allowed) -> Iterator[pa.Table]:
    """Rows of a manifest, or of a Parquet file that holds images."""
    folder = uri.rsplit("/", 1)[0]
    numbers = count()
    empty = True
    for rows in _batches(uri):
        empty = False
        if clash := taken(rows.schema):
            raise ConfigError(f"{uri}: column {clash[0]} is one that scoring writes itself; rename it")
        if "uri" in rows.schema.names:
            places = [Place(_resolved(name, folder)) for name in _texts(rows, "uri")]
            refusals = [allowed.refusal(place.uri) for place in places]
        else:
            places = [row_of(uri, number) for number in islice(numbers, rows.num_rows)]
            refusals = [""] * len(places)
        named = _texts(rows, "category") or [""] * len(places)
        chosen = [name or categories.of(place.path) for name, place in zip(named, places, strict=True)]
        masks = [_resolved(mask, folder) if mask else "" for mask in _texts(rows, "mask")]
        if masks:
            refusals = [r or (allowed.refusal(m) if m else "") for r, m in zip(refusals, masks, strict=True)]
        yield _table(places, chosen, refusals, _with_masks(rows, masks))
    if empty:
        raise DataError(f"{uri}: this manifest has no rows")


def _with_masks(rows: pa.Table, masks: list[str]) -> pa.Table:
    if not masks:
        return rows
    return rows.set_column(rows.schema.get_field_index("mask"), "mask", pa.array(masks, pa.string()))


def _resolved(name: str, folder: str) -> str:
    """A URI of a manifest: itself, or under the manifest's folder if it is relative."""
    if "://" in name or name.startswith("/"):
        return storage.absolute(name) if storage.is_local(name) else name
    return f"{folder}/{PurePosixPath(name)}"


def _batches(uri: str) -> Iterator[pa.Table]:
    """A table's rows, some thousands at a time, without the images that it may hold.

    Raises:
        DataError: if it cannot be read, or says nothing of images.
    """
    filesystem, path = storage.arrow_filesystem(uri)
    try:
        with filesystem.open_input_file(path) as file:
            batches: Iterable[pa.RecordBatch]
            if uri.lower().endswith(PARQUET):
                parquet = pq.ParquetFile(file)
                schema = parquet.schema_arrow
                held = "" if "uri" in schema.names else image_column(schema)
                batches = parquet.iter_batches(CHUNK, columns=[name for name in schema.names if name != held])
            else:
                reader: Any = pa_csv.open_csv(file) if uri.lower().endswith(".csv") else pa_json.open_json(file)
                batches, schema, held = reader, reader.schema, ""
            if "uri" not in schema.names and not held:
                raise DataError(
                    f"{uri}: no column `uri`, nor images in a column {' or '.join(IMAGE_COLUMNS)}; its columns are "
                    f"{', '.join(schema.names)}"
                )
            for batch in batches:
                rows = pa.Table.from_batches([batch])
                for start in range(0, rows.num_rows, CHUNK):
                    yield rows.slice(start, CHUNK)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{uri}: this manifest cannot be read: {error}") from error
