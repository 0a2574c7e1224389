from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
from PIL import Image

from stpm.evaluation.gallery import defect_sheet, galleries
from tests.evaluation.runs import measured, scored_run


def test_the_sheet_shows_four_defects(tmp_path: Path) -> None:
    category = scored_run(tmp_path)
    picture = defect_sheet(category)
    assert picture
    with Image.open(io.BytesIO(picture)) as image:
        assert image.size == (2 * 520 + 24, 2 * 296 + 24)
        # The second half of each cell is half image, of some grey, and half heatmap, of the palette's last red.
        red, green, blue = image.getpixel((8 + 256 + 8 + 200, 8 + 200))  # type: ignore[misc]
        assert 100 < red < 135
        assert max(green, blue) < 70
        # The first half has the outline of the mask, two pixels wide.
        half = np.asarray(image.crop((8, 8, 264, 264)))
        assert 100 < (half == (0, 255, 255)).all(axis=2).sum() < 1000
    assert defect_sheet(dataclasses.replace(category, name="no-such-category")) is None


def test_galleries_show_missed_defects_and_false_alarms(tmp_path: Path) -> None:
    category = scored_run(tmp_path)
    rows = sorted(category.rows().to_pylist(), key=lambda row: row["score"])
    found = galleries(category, max_tiles=20)
    expected = {
        "Largest scores": rows[::-1],
        "Missed defects": [row for row in rows if row["label"] != "good" and not row["is_anomalous"]],
        "False alarms": [row for row in rows[::-1] if row["label"] == "good" and row["is_anomalous"]],
    }
    for title, shown in expected.items():
        assert [tile.name for tile in found[title]] == ["/".join(row["uri"].split("/")[-2:]) for row in shown]
        verdict = "not anomalous" if title == "Missed defects" else "anomalous"
        assert title == "Largest scores" or all(tile.found.endswith(f", {verdict}") for tile in found[title])
    with Image.open(io.BytesIO(found["Largest scores"][0].picture)) as image:
        assert (image.format, image.size) == ("JPEG", (328, 160))


def test_images_without_a_label_or_that_are_gone_are_left_out(tmp_path: Path) -> None:
    category = scored_run(tmp_path, unlabelled=12)
    found = galleries(category, max_tiles=20)
    assert (len(found["Largest scores"]), found["Missed defects"], found["False alarms"]) == (12, [], [])
    assert defect_sheet(category) is None
    for row in category.rows().to_pylist()[:3]:
        Path(str(row["uri"])).unlink()
    assert len(galleries(category, max_tiles=20)["Largest scores"]) == 9
    assert measured(category).unlabelled_count == 12
