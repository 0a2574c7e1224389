"""Make rows of the manifest: one for each image, with the id that everything written names it by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stpm.data.image_files import ImageRef
from stpm.data.mvtec import Category
from stpm.errors import ImageError
from stpm.names import as_utf8, is_utf8
from stpm.scoring.schema import MANIFEST, Int64Array, error_columns, table

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
    texts = {name: [as_utf8(getattr(row, name)) for row in rows] for name in ("category", "label", "mask")}
    position = {
        "archive_start": [row.image.start for row in rows],
        "archive_length": [row.image.length for row in rows],
    }
    errors = error_columns([row.error or _error(row) for row in rows])
    return table({"image_id": _image_ids(uris), "uri": uris} | texts | errors | position, MANIFEST)


def make_rows_from_columns(
    uris: pa.ChunkedArray,
    categories: pa.ChunkedArray,
    labels: pa.ChunkedArray,
    masks: pa.ChunkedArray,
    starts: Int64Array,
    lengths: Int64Array,
) -> pa.Table:
    """Make a table of schema MANIFEST from its columns. Only a row without a category gets an error."""
    has_category = pc.not_equal(categories, "")
    columns = {
        "image_id": _image_ids(uris.to_pylist()),
        "uri": uris,
        "category": categories,
        "label": labels,
        "mask": masks,
        "error_kind": pc.if_else(has_category, "", _NO_CATEGORY.kind),
        "error_message": pc.if_else(has_category, "", str(_NO_CATEGORY)),
        "archive_start": starts,
        "archive_length": lengths,
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
