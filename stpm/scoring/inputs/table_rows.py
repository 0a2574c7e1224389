"""Make manifest rows of a user's tables: of URIs, stored listings, and Parquet files that hold the images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from stpm.data.image_files import ImageRef
from stpm.errors import ConfigError, ImageError, NoImagesError, UriError
from stpm.scoring.inputs import tables
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.manifest import ManifestRow, make_rows
from stpm.scoring.inputs.table_uris import check_allowed, resolve
from stpm.scoring.schema import reserved_columns, with_passthrough


def table_rows(uri: str, rule: CategoryRule, allowed: Sequence[str]) -> Iterator[pa.Table]:
    """Yield the manifest rows of a table, a part of it at a time.

    Args:
        rule: chooses the category of rows that name none.
        allowed: prefixes of the URIs that the table may name.

    Raises:
        NoImagesError: if it has no rows, or names no images.
        DataError: if it cannot be read.
        ConfigError: if it has a column that scoring writes itself.
    """
    first, is_empty = 0, True
    for part in tables.read(uri):
        if clashing := reserved_columns(part.schema.names):
            raise ConfigError(f"{uri}: column {clashing[0]} is one that scoring writes itself; rename it")
        is_empty = False
        yield with_passthrough(part_rows(part, first, uri, rule, allowed), part)
        first += part.num_rows
    if not first:
        raise NoImagesError(f"{uri}: this table {'has no rows' if is_empty else 'names no images'}")


def part_rows(part: pa.Table, first: int, uri: str, rule: CategoryRule, allowed: Sequence[str]) -> pa.Table:
    """Make the rows of a part of a table. `first` is the number of its first row in the table."""
    folder, holds_images = uri.rsplit("/", 1)[0], "uri" not in part.schema.names
    rows = []
    for number, (name, category, label, mask, roi) in enumerate(tables.input_values(part), first):
        row_uri = f"{uri}#{number}"
        image, path = ImageRef(row_uri, number, 1) if holds_images else ImageRef(row_uri), ""
        mask_uri = roi_uri = ""
        try:
            if name:
                image = ImageRef(resolve(name, folder))
            if name or holds_images:
                path = image.path
                mask_uri, roi_uri = resolve(mask, folder), resolve(roi, folder)
                error = check_allowed([image.uri if name else "", mask_uri, roi_uri], allowed)
            else:
                error = ImageError("missing", "this row of the table has no uri")
        except UriError as problem:
            error = ImageError("not_allowed", str(problem))
        # A pattern describes image paths, and a row that names no image has none.
        chosen = category or (rule.category(path) if path else rule.fixed)
        rows.append(ManifestRow(image, chosen, label, mask_uri, roi_uri, error))
    return make_rows(rows)
