import base64
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stpm.evaluation import gallery
from stpm.evaluation.gallery import galleries
from stpm.method.scales import HeatmapScale
from tests.datasets import with_column, write_rows
from tests.evaluation.runs import scored_run

SCALE = HeatmapScale(0.1, 1.0)


def decode(uri: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as image:
        return np.asarray(image.convert("RGBA"))


def test_galleries_show_all_missed_defects_and_false_alarms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    category = scored_run(tmp_path)
    (file,) = category.output.files()
    table = pq.read_table(file)
    write_rows(category.output, with_column(table, "is_anomalous", [i % 3 == 0 for i in range(12)]))
    rows = sorted(category.rows().to_pylist(), key=lambda row: row["score"])
    expected = {
        "Missed defects": [row for row in rows if row["label"] != "good" and not row["is_anomalous"]],
        "False alarms": [row for row in rows[::-1] if row["label"] == "good" and row["is_anomalous"]],
        "Largest scores": rows[::-1],
    }
    assert list(map(len, expected.values())) == [4, 2, 12]
    for limit in (60, 1):
        monkeypatch.setattr(gallery, "_MAX_TILES", limit)
        found = galleries(category, SCALE)
        assert list(found) == list(expected)
        for title, shown in expected.items():
            assert found[title].total == len(shown)
            first = shown[: 8 if title == "Largest scores" else limit]
            assert [tile.row["uri"] for tile in found[title].tiles] == [row["uri"] for row in first]


def test_a_tile_has_the_picture_its_heatmap_and_the_outline_of_the_mask(tmp_path: Path) -> None:
    tiles = galleries(scored_run(tmp_path), SCALE)["Largest scores"].tiles
    good, defect = (
        next(tile for tile in tiles if (tile.row["label"] == "good") == is_good) for is_good in (True, False)
    )
    assert good.outline == ""
    for tile in (good, defect):
        assert (tile.size, decode(tile.picture).shape) == ((160, 192), (192, 160, 4))
        # The heatmaps are of the palette's last red, and opaque enough.
        np.testing.assert_array_equal(decode(tile.heatmap), np.broadcast_to([128, 0, 0, 160], (192, 160, 4)))
    opaque = decode(defect.outline)[..., 3] == 255
    assert 50 < opaque.sum() < 1000


def test_images_without_a_label_or_that_are_gone_are_left_out(tmp_path: Path) -> None:
    category = scored_run(tmp_path, unlabelled=12)
    found = galleries(category, SCALE)
    assert [(len(each.tiles), each.total) for each in found.values()] == [(0, 0), (0, 0), (8, 12)]
    for row in category.rows().to_pylist()[:5]:
        Path(str(row["uri"])).unlink()
    assert len(galleries(category, SCALE)["Largest scores"].tiles) == 7
