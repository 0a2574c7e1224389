"""alarms.coco.json: the anomalous images of a run and their regions, as tools that label images import them.

The format is COCO's object detection (cocodataset.org/#format-data): the category of an annotation is its product.
"""

from __future__ import annotations

import json

import pyarrow.dataset as ds

from stpm import storage
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import naming_damaged_file, open_rows

_COLUMNS = ["uri", "category", "width", "height", "regions"]


def write_coco(output: RunOutput) -> None:
    """Write the file, images by URI, from the rows of a run that has scored all images. Raise RunDamagedError."""
    with naming_damaged_file(output):
        rows = open_rows(output, _COLUMNS).to_table(columns=_COLUMNS, filter=ds.field("is_anomalous"))
    alarms = rows.sort_by("uri")
    names = sorted(alarms["category"].unique().to_pylist())
    numbers = {name: number for number, name in enumerate(names, 1)}
    categories = [json.dumps({"id": numbers[name], "name": name, "supercategory": "defect"}) for name in names]
    # Lines of text: they take a fraction of the memory of as many objects.
    images: list[str] = []
    annotations: list[str] = []
    for row in (row for batch in alarms.to_batches(1024) for row in batch.to_pylist()):
        image = {"id": len(images) + 1, "file_name": row["uri"], "width": row["width"], "height": row["height"]}
        images.append(json.dumps(image))
        for region in row["regions"]:
            left, top, right, bottom = (region[name] for name in ("left", "top", "right", "bottom"))
            ids = {"id": len(annotations) + 1, "image_id": len(images), "category_id": numbers[row["category"]]}
            box = {"bbox": [left, top, right - left, bottom - top], "area": region["area"], "score": region["score"]}
            annotations.append(json.dumps(ids | box | {"segmentation": [], "iscrowd": 0}))
    lists = {"categories": categories, "images": images, "annotations": annotations}
    text = ",\n".join(f'"{name}": [\n' + ",\n".join(lines) + "]" for name, lines in lists.items())
    info = json.dumps({"description": "anomalous images and their regions, by stpm"})
    storage.publish(output.coco, f'{{"info": {info}, "licenses": [],\n{text}}}\n'.encode())
