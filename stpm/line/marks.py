"""Read the marks of a person: a table of images with the columns uri, category and label."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from stpm import storage
from stpm.data.mvtec import GOOD
from stpm.errors import DataError
from stpm.scoring.inputs import tables
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.table_rows import part_rows
from stpm.scoring.inputs.table_uris import allowed_prefixes


@dataclass(frozen=True)
class Marks:
    """The images of a table.

    Args:
        good: URIs of the images that are marked as good, by category.
        other: number of images without the label good, by each of their labels, such as `defect`.
        rois: of images with a region of interest of their own, the URI of its mask, by theirs.
        refused: images that are marked as good and cannot be used, by URI or row, with the reason.
    """

    good: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    other: Counter[str] = field(default_factory=Counter)
    rois: dict[str, str] = field(default_factory=dict)
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
    labels: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    unusable: dict[str, str] = {}
    rois: dict[str, str] = {}
    first = 0
    for part in tables.read(uri):
        if "uri" not in part.schema.names:
            raise DataError(f"{table}: no column `uri`; its columns are {', '.join(part.schema.names)}")
        for row in part_rows(part, first, uri, CategoryRule(), allowed_prefixes(uri, allow)).to_pylist():
            if categories and row["category"] not in categories:
                continue
            labels[row["uri"], row["category"]].add(row["label"])
            if row["roi"]:
                rois[row["uri"]] = row["roi"]
            if row["error_kind"]:
                unusable[row["uri"]] = row["error_message"]
        first += part.num_rows
    marks = Marks(rois=rois)
    for (image, category), found in labels.items():
        if GOOD not in found:
            marks.other.update(found)
        elif len(found) > 1:
            marks.refused[image] = f"it is marked as {' and as '.join(sorted(map(repr, found)))}"
        elif image in unusable:
            marks.refused[image] = unusable[image]
        else:
            marks.good[category].append(image)
    return marks
