"""Read the marks of a person: a table of images with the columns uri, category and label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from stpm import storage
from stpm.data.mvtec import GOOD
from stpm.errors import DataError, UriError
from stpm.scoring.inputs import tables
from stpm.scoring.inputs.table_uris import allowed_prefixes, check_allowed, resolve


@dataclass(frozen=True)
class Marks:
    """The images of a table.

    Args:
        good: URIs of the images that are marked as good, by category.
        other: number of images without the label good, by each of their labels, such as `defect`.
        refused: images that are marked as good and cannot be used, by URI or row, with the reason.
    """

    good: dict[str, list[str]] = field(default_factory=dict)
    other: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def read_marks(table: str, allow: Sequence[str] = (), categories: Sequence[str] = ()) -> Marks:
    """Read a table of marked images, each once.

    Args:
        table: URI of a `.parquet`, `.csv`, `.jsonl` or `.ndjson` file.
        allow: prefixes of the URIs that it may name; none: its own bucket or folder, as for scoring.
        categories: names of the categories to read; none: all.

    Raises:
        DataError: if the table cannot be read, or has no column `uri`.
    """
    uri = storage.absolute(table)
    if not uri.lower().endswith(tables.SUFFIXES):
        raise DataError(f"{table}: a table is a file of {', '.join(tables.SUFFIXES)}; name one")
    allowed, folder = allowed_prefixes(uri, allow), uri.rsplit("/", 1)[0]
    labels: dict[tuple[str, str], set[str]] = {}
    unusable: dict[str, str] = {}
    row = 0
    marks = Marks()
    for chunk in tables.read(uri):
        if "uri" not in chunk.schema.names:
            raise DataError(f"{table}: no column `uri`; its columns are {', '.join(chunk.schema.names)}")
        for name, category, label, _ in tables.input_values(chunk):
            row += 1
            if categories and category not in categories:
                continue
            image, problem = _resolve(name, folder, allowed)
            image = image or f"{table}, row {row}"
            if problem:
                unusable[image] = problem
            labels.setdefault((image, category), set()).add(label)
    for (image, category), found in labels.items():
        if GOOD not in found:
            for label in found:
                marks.other[label] = marks.other.get(label, 0) + 1
        elif len(found) > 1:
            marks.refused[image] = f"it is marked as {' and as '.join(sorted(map(repr, found)))}"
        elif image in unusable:
            marks.refused[image] = unusable[image]
        else:
            marks.good.setdefault(category, []).append(image)
    return marks


def _resolve(name: str, folder: str, allowed: Sequence[str]) -> tuple[str, str]:
    """Return an image's URI, "" if there is none to show; and why the image cannot be used, "" if it can."""
    try:
        image = resolve(name, folder)
    except UriError as error:
        return "", str(error)
    return (image, str(check_allowed([image], allowed) or "")) if image else ("", "it has no uri")
