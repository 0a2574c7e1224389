"""The list of what is to be scored, fixed before the work starts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import pyarrow as pa

from stpm import storage
from stpm.errors import DataError
from stpm.images import SUFFIXES
from stpm.mvtec import Category
from stpm.scoring.schema import MANIFEST, table


def image_id(uri: str) -> int:
    """A signed 64-bit hash of a URI: the image's identity in all that is written."""
    return int.from_bytes(hashlib.blake2b(uri.encode(), digest_size=8).digest(), "big", signed=True)


def of_folder(uri: str, category: str) -> pa.Table:
    """The images under a folder at any depth, or the one image that the URI names, all of one category.

    Raises:
        DataError: if there are none.
    """
    uris = [found for found, _ in storage.files(uri) if found.lower().endswith(SUFFIXES)]
    if not uris:
        raise DataError(f"{uri}: no images here (of {', '.join(SUFFIXES)})")
    return _manifest((found, category, "", "") for found in uris)


def of_test_images(categories: Sequence[Category]) -> pa.Table:
    """The labelled test images of some categories."""
    return _manifest((i.uri, category.name, i.label, i.mask) for category in categories for i in category.test)


def _manifest(rows: Iterable[tuple[str, str, str, str]]) -> pa.Table:
    columns: dict[str, list[object]] = {field.name: [] for field in MANIFEST}
    for uri, category, label, mask in rows:
        for name, value in zip(columns, (image_id(uri), uri, category, label, mask), strict=True):
            columns[name].append(value)
    return table(columns, MANIFEST)
