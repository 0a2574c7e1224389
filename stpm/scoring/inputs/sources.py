"""Turn sources of images (folders, globs, archives, tables, lists) into manifest rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from glob import has_magic
from itertools import islice

import pyarrow as pa

from stpm import storage
from stpm.data.decoding import SUFFIXES
from stpm.data.image_files import TAR, ImageRef, tar_images
from stpm.errors import ImageError, NoImagesError
from stpm.names import as_utf8
from stpm.scoring.inputs import tables
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.manifest import SHARD_ROWS, ManifestRow, make_rows
from stpm.scoring.inputs.table_rows import table_rows
from stpm.scoring.inputs.table_uris import allowed_prefixes
from stpm.scoring.output import is_picture

# Whose headers are read at the same time.
_ARCHIVES = 16

_ESCAPED = re.compile(r"\[([*?[])\]")


def image_rows(
    sources: Sequence[str],
    rule: CategoryRule,
    allow: Sequence[str] = (),
    settle: storage.Settle | None = None,
) -> Iterator[pa.Table]:
    """Yield the manifest rows of several sources, at most SHARD_ROWS at a time. Duplicates are still among them.

    Args:
        sources: folders, prefixes, globs, tar archives, tables (Parquet, CSV, JSON lines), Parquet files that hold
            the images themselves. A glob may match any of these. A source is taken literally if it exists by that
            name, or if each of its `*`, `?` and `[` is escaped as `[*]`, `[?]`, `[[]`.
        rule: chooses the category of images whose table does not name one.
        allow: prefixes of the URIs that a table may name; none: see `allowed_prefixes`.
        settle: leaves out files and archives that may still be being written; what a table names is not looked at.

    Raises:
        NoImagesError: if a source has no image.
        DataError: if a table or an archive cannot be read.
        ConfigError: if a table has a column that scoring writes itself, or a bucket does not exist.
    """
    for source in sources:
        is_empty = True
        for rows in _source_rows(source, rule, allow, settle or storage.Settle()):
            is_empty = False
            yield rows
        if is_empty:
            raise NoImagesError(
                f"{source}: no images here (of {', '.join(SUFFIXES)}, or in {TAR}); is the path right, and mounted?"
            )


def _source_rows(source: str, rule: CategoryRule, allow: Sequence[str], settle: storage.Settle) -> Iterator[pa.Table]:
    uri = storage.absolute(source)
    name = _literal_name(uri)
    if uri.lower().endswith(tables.SUFFIXES):
        for table in [name] if name else storage.glob(uri)[0]:
            yield from table_rows(table, rule, allowed_prefixes(table, allow))
        return
    files = storage.iter_files(name, settle) if name else _matching_files(uri, settle)
    yield from _file_rows(_images_in(_without_hidden(files, uri)), rule)


def _without_hidden(files: Iterator[str], source: str) -> Iterator[str]:
    """Leave out heatmaps of runs, and names that begin with a dot, unless the source itself has as many."""
    named = source.count("/.")
    return (file for file in files if file.count("/.") <= named and not is_picture(file))


def _matching_files(pattern: str, settle: storage.Settle) -> Iterator[str]:
    """Yield the files that a glob matches, and those in the folders that it matches."""
    files, folders = storage.glob(pattern, settle)
    # `**` also matches what is in a folder that it matches.
    found = set(folders)

    def is_inside_one(uri: str) -> bool:
        return any(uri[:i] in found for i, character in enumerate(uri) if character == "/")

    yield from (file for file in files if not is_inside_one(file))
    for folder in folders:
        if not is_inside_one(folder):
            yield from storage.iter_files(folder, settle)


def _literal_name(uri: str) -> str:
    """Return the one name that a source stands for, or "" if it is a glob."""
    if not has_magic(uri) or storage.exists(uri):
        return uri
    return "" if has_magic(_ESCAPED.sub("", uri)) else _ESCAPED.sub(r"\1", uri)


def _images_in(files: Iterator[str]) -> Iterator[tuple[ImageRef, ImageError | None]]:
    """Yield the images among files, and those in archives; an archive's error has a row of its own."""
    while some := list(islice(files, _ARCHIVES)):
        archives = [file for file in some if file.lower().endswith(TAR)]
        listed = dict(zip(archives, storage.in_parallel(tar_images, archives), strict=True))
        for file in some:
            if file.lower().endswith(SUFFIXES):
                yield ImageRef(file), None
            elif file in listed:
                images, error = listed[file]
                yield from ((image, None) for image in images)
                if error:
                    yield ImageRef(file), error


def _file_rows(images: Iterator[tuple[ImageRef, ImageError | None]], rule: CategoryRule) -> Iterator[pa.Table]:
    while some := list(islice(images, SHARD_ROWS)):
        # A pattern describes image paths, and a damaged archive is not an image.
        chosen = (rule.fixed if error else rule.category(as_utf8(image.path)) for image, error in some)
        yield make_rows(
            [ManifestRow(image, category, error=error) for (image, error), category in zip(some, chosen, strict=True)]
        )
