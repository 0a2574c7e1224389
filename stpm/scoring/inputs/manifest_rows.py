"""Make rows of the manifest: one for each image, with the id that everything written names it by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from stpm.data.image_files import ImageRef
from stpm.data.mvtec import Category
from stpm.errors import ImageError
from stpm.names import as_utf8, is_utf8
from stpm.scoring.schema import MANIFEST, Int64Array, table

_NO_CATEGORY = ImageError("no_model", "the image has no category; see --category and --category-from")


class ManifestRow(NamedTuple):
    """One image to score: `label` and `mask` are "" if unknown, `error` says why it cannot be scored."""

    image: ImageRef
    category: str
    label: str = ""
    mask: str = ""
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
    errors = [row.error or _error(row) for row in rows]
    columns = {
        "image_id": _image_ids(uris),
        "uri": uris,
        "category": [as_utf8(row.category) for row in rows],
        "label": [as_utf8(row.label) for row in rows],
        "mask": [as_utf8(row.mask) for row in rows],
        "error_kind": [error.kind if error else "" for error in errors],
        "error_message": [str(error) if error else "" for error in errors],
        "archive_start": [row.image.start for row in rows],
        "archive_length": [row.image.length for row in rows],
    }
    return table(columns, MANIFEST)


def _error(row: ManifestRow) -> ImageError | None:
    if not is_utf8(row.image.uri):
        return ImageError("bad_name", "the name is not UTF-8, bytes outside it are written %XX here; rename the file")
    return None if row.category else _NO_CATEGORY


def labelled_rows(categories: Sequence[Category]) -> Iterator[pa.Table]:
    """Yield a table of manifest rows for the labelled test images of each category."""
    for category in categories:
        yield make_rows(
            [ManifestRow(ImageRef(image.uri), category.name, image.label, image.mask) for image in category.test]
        )
