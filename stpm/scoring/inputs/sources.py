"""Where images come from: folders, globs, archives, manifests, lists; as manifest rows, a chunk at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import has_magic
from itertools import islice
from pathlib import Path, PurePosixPath

import pyarrow as pa

from stpm import storage
from stpm.data.images import SUFFIXES
from stpm.errors import ConfigError, DataError
from stpm.scoring.inputs import manifest, tables
from stpm.scoring.inputs.archives import TAR, ImageRef, members, row_of
from stpm.scoring.inputs.categories import Categories
from stpm.scoring.inputs.manifest import GOOD, Error
from stpm.scoring.inputs.tables import CHUNK
from stpm.scoring.schema import GIVEN, taken

STANDARD_INPUT = "-"

_QUOTED = re.compile(r"\[([*?[])\]")


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
            the images themselves, or `-` for a list of URIs. A glob may end in any of these. A name that exists is no
            glob, and neither is one whose `*`, `?` and `[` are all written `[*]`, `[?]` and `[[]`.
        categories: for images whose manifest does not name one.
        allow: prefixes that a manifest's URIs may have, if not those of the manifest itself.
        lines: the list, a URI per line.

    Raises:
        DataError: if a source has no image, or a manifest or an archive cannot be read.
        ConfigError: if a manifest has a column that scoring writes itself, or a bucket is not there.
    """
    for source in sources:
        empty = True
        for rows in _of_source(source, categories, allow, lines):
            empty = False
            yield rows
        if empty:
            raise DataError(f"{source}: no images here (of {', '.join(SUFFIXES)}, or in {TAR})")


def _of_source(source: str, categories: Categories, allow: Sequence[str], lines: Iterable[str]) -> Iterator[pa.Table]:
    if source == STANDARD_INPUT:
        listed = (ImageRef(storage.absolute(line.strip())) for line in lines if line.strip())
        yield from _of_places(listed, categories)
        return
    uri = storage.absolute(source)
    name = _plain(uri)
    if uri.lower().endswith(tables.SUFFIXES):
        for table in [name] if name else storage.glob(uri):
            yield from _of_table(table, categories, Allowed.by(table, allow))
        return
    files = storage.stream(name) if name else storage.glob(uri)
    yield from _of_places((place for file in files for place in _images(file)), categories)


def _plain(uri: str) -> str:
    """The one name that a source means, or "" if it is a glob."""
    if not has_magic(uri) or storage.exists(uri):
        return uri
    return "" if has_magic(_QUOTED.sub("", uri)) else _QUOTED.sub(r"\1", uri)


def _images(file: str) -> Iterable[ImageRef]:
    if file.lower().endswith(SUFFIXES):
        return [ImageRef(file)]
    return members(file) if file.lower().endswith(TAR) else []


def _of_places(places: Iterator[ImageRef], categories: Categories) -> Iterator[pa.Table]:
    while chunk := list(islice(places, CHUNK)):
        yield manifest.new_rows(chunk, [categories.of(storage.as_utf8(place.path)) for place in chunk])


def _of_table(uri: str, categories: Categories, allowed: Allowed) -> Iterator[pa.Table]:
    """Rows of a manifest, or of a Parquet file that holds images."""
    folder = uri.rsplit("/", 1)[0]
    first = 0
    for rows, hold_images in tables.read(uri):
        if clash := taken(rows.schema.names):
            raise ConfigError(f"{uri}: column {clash[0]} is one that scoring writes itself; rename it")
        given = {name: rows[name].to_pylist() for name in GIVEN if name in rows.schema.names}
        nothing = [""] * rows.num_rows
        masks = [mask and _resolved(mask, folder) for mask in given.get("mask", nothing)]
        if hold_images:
            places = [row_of(uri, first + row) for row in range(rows.num_rows)]
            errors = [_refused(allowed, mask) for mask in masks]
        else:
            names = given["uri"]
            places = [
                ImageRef(_resolved(name, folder) if name else f"{uri}#{first + i}") for i, name in enumerate(names)
            ]
            errors = [
                _refused(allowed, place.uri, mask) if name else ("missing", "this row of the manifest has no uri")
                for name, place, mask in zip(names, places, masks, strict=True)
            ]
        first += rows.num_rows
        named = given.get("category", nothing)
        chosen = [name or categories.of(place.path) for name, place in zip(named, places, strict=True)]
        yield manifest.new_rows(places, chosen, given.get("label", nothing), masks, errors, rows)
    if not first:
        raise DataError(f"{uri}: this manifest has no rows")


def _refused(allowed: Allowed, *uris: str) -> Error:
    reason = next(filter(None, (allowed.refusal(uri) for uri in uris if uri)), "")
    return ("not_allowed", reason) if reason else GOOD


def _resolved(name: str, folder: str) -> str:
    """A URI of a manifest: itself, or under the manifest's folder if it is relative."""
    if "://" in name or name.startswith("/"):
        return storage.absolute(name) if storage.is_local(name) else name
    return f"{folder}/{PurePosixPath(name)}"
