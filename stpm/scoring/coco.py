"""alarms.coco.json: the anomalous images of a run and their regions, as tools that label images import them.

The format is COCO's object detection (cocodataset.org/#format-data): the category of an annotation is its product.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from tempfile import TemporaryFile
from typing import IO, Any

import pyarrow.dataset as ds

from stpm import storage
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import read_batches

_COLUMNS = ["uri", "category", "width", "height", "regions"]
# In memory at a time, with up to 20 regions each.
_ROWS = 256


def write_coco(output: RunOutput, products: Iterable[str]) -> None:
    """Write the file from the rows of a run that has scored all images of some products. Raise RunDamagedError."""
    numbers = {name: number for number, name in enumerate(sorted(products), 1)}
    categories = [{"id": number, "name": name, "supercategory": "defect"} for name, number in numbers.items()]
    info = {"description": "anomalous images and their regions, by stpm"}
    head = json.dumps({"info": info, "licenses": [], "categories": categories})
    image_count = region_count = 0
    # The annotations, which come after all images, wait in a file.
    with storage.writing(output.coco) as file, TemporaryFile() as annotations:
        file.write(f'{head[:-1]},\n"images": ['.encode())
        for batch in read_batches(output, _COLUMNS, ds.field("is_anomalous"), _ROWS):
            for row in batch.to_pylist():
                image_count += 1
                names = {"file_name": row["uri"], "width": row["width"], "height": row["height"]}
                _append(file, {"id": image_count, **names})
                for region in row["regions"]:
                    region_count += 1
                    left, top, right, bottom = (region[name] for name in ("left", "top", "right", "bottom"))
                    ids = {"id": region_count, "image_id": image_count, "category_id": numbers[row["category"]]}
                    box = {"bbox": [left, top, right - left, bottom - top], "area": region["area"]}
                    _append(annotations, {**ids, **box, "score": region["score"], "segmentation": [], "iscrowd": 0})
        annotations.seek(0)
        file.write(b'],\n"annotations": [')
        shutil.copyfileobj(annotations, file)
        file.write(b"]}\n")


def _append(file: IO[bytes], item: Mapping[str, Any]) -> None:
    """Write an item of a list in a line of its own."""
    file.write(f"{',' if item['id'] > 1 else ''}\n{json.dumps(item)}".encode())
