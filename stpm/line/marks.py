"""Read the marks of a person: a table of images with the columns uri, category and label."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

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

    good: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    other: Counter[str] = field(default_factory=Counter)
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
    labels: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    unusable: dict[str, str] = {}
    numbers = count(1)
    for chunk in tables.read(uri):
        if "uri" not in chunk.schema.names:
            raise DataError(f"{table}: no column `uri`; its columns are {', '.join(chunk.schema.names)}")
        for (name, category, label, *_), row in zip(tables.input_values(chunk), numbers, strict=False):
            if categories and category not in categories:
                continue
            image = ""
            try:
                image = resolve(name, folder)
                problem = str(check_allowed([image], allowed) or "") if image else "it has no uri"
            except UriError as error:
                problem = str(error)
            image = image or f"{table}, row {row}"
            if problem:
                unusable[image] = problem
            labels[image, category].add(label)
    marks = Marks()
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
