"""alarms.coco.json: the anomalous images of a run and their regions, as tools that label images import them.

The format is COCO's object detection (cocodataset.org/#format-data): the category of an annotation is its product.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from stpm import storage
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import naming_damaged_file, open_rows

_COLUMNS = ["uri", "category", "width", "height", "regions"]


def write_coco(output: RunOutput) -> None:
    """Write the file, images by URI, from the rows of a run that has scored all images. Raise RunDamagedError."""
    with naming_damaged_file(output):
        rows = open_rows(output, _COLUMNS).to_table(columns=_COLUMNS, filter=ds.field("is_anomalous"))
    storage.publish(output.coco, "".join(_encode(rows.sort_by("uri"))).encode())


def _encode(alarms: pa.Table) -> Iterator[str]:
    """Write the parts of the file; of the alarms, keep a batch at a time as objects of Python."""
    names = sorted(alarms["category"].unique().to_pylist())
    numbers = {name: number for number, name in enumerate(names, 1)}

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        return enumerate((row for batch in alarms.to_batches(1024) for row in batch.to_pylist()), 1)

    categories = ({"id": number, "name": name, "supercategory": "defect"} for name, number in numbers.items())
    images = (
        {"id": number, "file_name": row["uri"], "width": row["width"], "height": row["height"]}
        for number, row in rows()
    )
    found = ((number, row["category"], region) for number, row in rows() for region in row["regions"])
    annotations = (
        {
            "id": identifier,
            "image_id": number,
            "category_id": numbers[category],
            "bbox": [box["left"], box["top"], box["right"] - box["left"], box["bottom"] - box["top"]],
            "area": box["area"],
            "segmentation": [],
            "iscrowd": 0,
            "score": box["score"],
        }
        for identifier, (number, category, box) in enumerate(found, 1)
    )
    yield '{"info": {"description": "Anomalous images and their regions, by stpm"}, "licenses": []'
    for name, values in (("categories", categories), ("images", images), ("annotations", annotations)):
        yield f', "{name}": ['
        yield from _separated(values)
        yield "]"
    yield "}\n"


def _separated(values: Iterable[dict[str, Any]]) -> Iterator[str]:
    for index, value in enumerate(values):
        yield f"{',' if index else ''}\n{json.dumps(value, allow_nan=False)}"
