"""Turn sources of images (folders, globs, archives, manifests, lists) into manifest rows, a chunk at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from glob import has_magic
from itertools import islice
from pathlib import Path, PurePosixPath

import pyarrow as pa

from stpm import storage
from stpm.data.images import SUFFIXES
from stpm.errors import ConfigError, ImageError, NoImagesError
from stpm.scoring.inputs import tables
from stpm.scoring.inputs.archives import TAR, ImageRef, tar_images
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.manifest import ManifestRow, make_rows
from stpm.scoring.inputs.tables import CHUNK_ROWS
from stpm.scoring.schema import reserved_columns

STANDARD_INPUT = "-"

_ESCAPED = re.compile(r"\[([*?[])\]")


def allowed_prefixes(manifest: str, prefixes: Sequence[str]) -> tuple[str, ...]:
    """Return the given prefixes, or if there are none, the manifest's own folder, or its bucket in object storage.

    A manifest is foreign data: it may name only URIs under these prefixes, so that a job does not read other files.
    """
    if prefixes:
        return tuple(storage.absolute(prefix) for prefix in prefixes)
    if storage.is_local(manifest):
        return (str(Path(storage.absolute(manifest)).parent),)
    scheme, _, path = manifest.partition("://")
    return (f"{scheme}://{path.split('/', 1)[0]}",)


def check_allowed(uris: Iterable[str], prefixes: Sequence[str]) -> ImageError | None:
    """Return an error if one of the URIs is not under one of the prefixes. Empty URIs are ignored."""
    if all(_is_allowed(uri, prefixes) for uri in uris if uri):
        return None
    return ImageError("not_allowed", f"the manifest may name only what is under {', '.join(prefixes)}; see --allow")


def _is_allowed(uri: str, prefixes: Sequence[str]) -> bool:
    if "::" in uri or ".." in uri.split("/"):
        return False
    return any(uri == prefix or uri.startswith(f"{prefix.rstrip('/')}/") for prefix in prefixes)


def image_rows(
    sources: Sequence[str], rule: CategoryRule, allow: Sequence[str] = (), lines: Iterable[str] = ()
) -> Iterator[pa.Table]:
    """Yield the manifest rows of several sources, at most `CHUNK_ROWS` at a time. Duplicates are still among them.

    Args:
        sources: folders, prefixes, globs, tar archives, manifests (Parquet, CSV, JSON lines), Parquet files that hold
            the images themselves, or `-` for a list of URIs. A glob may match any of these. A source is taken
            literally if it exists by that name, or if each of its `*`, `?` and `[` is escaped as `[*]`, `[?]`, `[[]`.
        rule: chooses the category of images whose manifest does not name one.
        allow: prefixes of the URIs that a manifest may name; none: see `allowed_prefixes`.
        lines: the list of URIs, one per line.

    Raises:
        NoImagesError: if a source has no image.
        DataError: if a manifest or an archive cannot be read.
        ConfigError: if a manifest has a column that scoring writes itself, or a bucket does not exist.
    """
    for source in sources:
        is_empty = True
        for rows in _source_rows(source, rule, allow, lines):
            is_empty = False
            yield rows
        if is_empty:
            raise NoImagesError(f"{source}: no images here (of {', '.join(SUFFIXES)}, or in {TAR})")


def _source_rows(source: str, rule: CategoryRule, allow: Sequence[str], lines: Iterable[str]) -> Iterator[pa.Table]:
    if source == STANDARD_INPUT:
        uris = (storage.absolute(line.strip()) for line in lines if line.strip())
        yield from _file_rows(((ImageRef(uri), None) for uri in uris), rule)
        return
    uri = storage.absolute(source)
    name = _literal_name(uri)
    if uri.lower().endswith(tables.SUFFIXES):
        for table in [name] if name else storage.glob(uri):
            yield from _table_rows(table, rule, allowed_prefixes(table, allow))
        return
    files = storage.stream(name) if name else storage.glob(uri)
    yield from _file_rows((image for file in files for image in _images_in(file)), rule)


def _literal_name(uri: str) -> str:
    """Return the one name that a source stands for, or "" if it is a glob."""
    if not has_magic(uri) or storage.exists(uri):
        return uri
    return "" if has_magic(_ESCAPED.sub("", uri)) else _ESCAPED.sub(r"\1", uri)


def _images_in(file: str) -> Iterator[tuple[ImageRef, ImageError | None]]:
    """Yield the image that a file is, or those of an archive; an archive's error has a row of its own."""
    if file.lower().endswith(SUFFIXES):
        yield ImageRef(file), None
    elif file.lower().endswith(TAR):
        images, error = tar_images(file)
        yield from ((image, None) for image in images)
        if error:
            yield ImageRef(file), error


def _file_rows(images: Iterator[tuple[ImageRef, ImageError | None]], rule: CategoryRule) -> Iterator[pa.Table]:
    def row(image: ImageRef, error: ImageError | None) -> ManifestRow:
        # A pattern matches paths of images, and an archive with an error is none.
        category = rule.fixed if error else rule.category(storage.as_utf8(image.path))
        return ManifestRow(image, category, error=error)

    while chunk := list(islice(images, CHUNK_ROWS)):
        yield make_rows([row(image, error) for image, error in chunk])


def _table_rows(uri: str, rule: CategoryRule, allowed: Sequence[str]) -> Iterator[pa.Table]:
    """Yield the rows of a manifest, or of a Parquet file that holds images."""
    folder = uri.rsplit("/", 1)[0]
    first, has_rows = 0, False
    for chunk in tables.read(uri):
        if clashing := reserved_columns(chunk.schema.names):
            raise ConfigError(f"{uri}: column {clashing[0]} is one that scoring writes itself; rename it")
        has_rows = True
        rows = []
        for number, (name, category, label, mask) in enumerate(tables.input_values(chunk), start=first):
            mask_uri = resolve(mask, folder)
            error = None
            if "uri" not in chunk.schema.names:
                image = ImageRef.parquet_row(uri, number)
                error = check_allowed([mask_uri], allowed)
            elif name:
                image = ImageRef(resolve(name, folder))
                error = check_allowed([image.uri, mask_uri], allowed)
            else:
                image = ImageRef(f"{uri}#{number}")
                error = ImageError("missing", "this row of the manifest has no uri")
            rows.append(ManifestRow(image, category or rule.category(image.path), label, mask_uri, error))
        first += len(rows)
        yield make_rows(rows, chunk)
    if not first:
        raise NoImagesError(f"{uri}: this manifest {'names no images' if has_rows else 'has no rows'}")


def resolve(name: str, folder: str) -> str:
    """Return the absolute URI of a name in a manifest; relative names are relative to the manifest's folder."""
    if "://" in name or name.startswith("/"):
        return storage.absolute(name) if storage.is_local(name) else name
    return f"{folder}/{PurePosixPath(name)}" if name else ""
