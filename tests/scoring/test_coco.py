import json
import tracemalloc
from pathlib import Path

from stpm.scoring.coco import write_coco
from stpm.scoring.output import RunOutput
from tests.datasets import make_output, write_rows


def region(*values: float) -> dict[str, float]:
    return dict(zip(("left", "top", "right", "bottom", "area", "score"), values, strict=True))


def test_the_alarms_are_images_and_their_regions_annotations(tmp_path: Path) -> None:
    """In two files of rows, with images that are no alarms, an error, and an alarm without a region."""
    output = RunOutput.single(str(tmp_path))
    columns = {
        "uri": ["s3://x/b.png", 's3://x/ä\u2028".png', "s3://x/a.tar#c.png", "s3://x/good.png", "s3://x/damaged"],
        "category": ["pill", "bolt", "pill", "bolt", "damaged"],
        "width": [800, 400, 800, 400, None],
        "height": [600, 300, 600, 300, None],
        "is_anomalous": [True, True, True, False, None],
        "regions": [
            [region(10, 20, 110, 60, 900, 3.5), region(0, 0, 8, 9, 70, 2.25)],
            [],
            [region(799, 599, 800, 600, 1, 1.5)],
            [region(1, 2, 3, 4, 4, 1.25)],
            None,
        ],
    }
    rows = make_output(5, **columns)
    write_rows(output, rows.slice(0, 2))
    write_rows(output, rows.slice(2), 1)
    write_coco(output, ["pill", "damaged", "bolt"])
    text = (tmp_path / "alarms.coco.json").read_text()
    found = json.loads(text)
    # A line each, of ASCII alone.
    assert len(text.splitlines()) == 3 + 3 + 3
    assert found.pop("info").keys() == {"description"}
    same = {"segmentation": [], "iscrowd": 0}
    assert found == {
        "licenses": [],
        # Those of all models of the run: the next one's have the same numbers.
        "categories": [
            {"id": i, "name": name, "supercategory": "defect"} for i, name in enumerate(("bolt", "damaged", "pill"), 1)
        ],
        "images": [
            {"id": 1, "file_name": "s3://x/b.png", "width": 800, "height": 600},
            {"id": 2, "file_name": 's3://x/ä\u2028".png', "width": 400, "height": 300},
            {"id": 3, "file_name": "s3://x/a.tar#c.png", "width": 800, "height": 600},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 20, 100, 40], "area": 900, "score": 3.5, **same},
            {"id": 2, "image_id": 1, "category_id": 3, "bbox": [0, 0, 8, 9], "area": 70, "score": 2.25, **same},
            {"id": 3, "image_id": 3, "category_id": 3, "bbox": [799, 599, 1, 1], "area": 1, "score": 1.5, **same},
        ],
    }


def test_memory_does_not_grow_with_the_number_of_alarms(tmp_path: Path) -> None:
    output, count = RunOutput.single(str(tmp_path)), 100
    columns = {"category": "nut", "width": 9, "height": 9, "is_anomalous": True, "regions": [region(*range(6))] * 20}
    peaks = []
    for number in range(12):
        rows = make_output(count, uri=[str(i) for i in range(count)], **{k: [v] * count for k, v in columns.items()})
        write_rows(output, rows, number)
        if number in (0, 11):
            tracemalloc.start()
            write_coco(output, ["nut"])
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[-1] < 2 * peaks[0]
    found = json.loads((tmp_path / "alarms.coco.json").read_text())
    assert (len(found["images"]), len(found["annotations"])) == (12 * count, 20 * 12 * count)
