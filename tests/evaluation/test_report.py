from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from stpm import images, storage
from stpm.calibration import HeatmapScale
from stpm.evaluation.category import METRICS, Figures, Metrics, evaluate
from stpm.evaluation.gallery import gallery
from stpm.evaluation.report import Failure, Report, Result
from stpm.mvtec import read_category
from stpm.record import FitSummary, ModelRecord
from stpm.scoring.manifest import of_test_images
from stpm.scoring.schema import OUTPUT, table
from stpm.scoring.target import Target
from tests.conftest import TINY
from tests.datasets import encoded, make_category

SIZE = 64
VIEW = images.View(SIZE)


def scored_run(root: Path, *, masks: bool = True, broken: int = 0) -> Target:
    """A run folder as scoring leaves it, with maps drawn by chance; defects score a little higher."""
    make_category(str(root / "data"), "nut", good=6, defects=6, masks=masks)
    rng = np.random.default_rng(1)
    (manifest,) = of_test_images([read_category(str(root / "data"), "nut")])
    target = Target.among(str(root / "run"), "seed-0")
    columns: dict[str, list[object]] = {f.name: [None] * manifest.num_rows for f in OUTPUT}
    columns |= {name: manifest[name].to_pylist() for name in manifest.schema.names}
    for i, label in enumerate(columns["label"]):
        anomaly_map = rng.random((SIZE, SIZE), np.float32)
        anomaly_map[14:34, 14:34] += 0.3 if label != "good" else 0.0
        failed = i < broken
        overlay = f"heatmaps/{i}.png"
        storage.publish(f"{target.out}/{overlay}", encoded(np.full((SIZE, SIZE, 3), 99, np.uint8)))
        columns["anomaly_map"][i] = None if failed else anomaly_map.tobytes()
        columns["score"][i] = None if failed else float(anomaly_map.max())
        columns["is_anomalous"][i] = None if failed else bool(anomaly_map.max() > 1)
        columns["width"][i], columns["height"][i] = 40, 48
        columns["error_kind"][i] = "damaged" if failed else ""
        columns["error_message"][i] = "cut off" if failed else ""
        columns["overlay"][i] = "" if failed else overlay
        columns["heatmap"][i] = columns["model_id"][i] = ""
    path = Path(target.scores) / "seed-0_0.parquet"
    path.parent.mkdir()
    pq.write_table(table(columns, OUTPUT), path)
    # Another pass in the same folder is none of this one's business.
    pq.write_table(table(columns, OUTPUT), path.with_name("seed-1_0.parquet"))
    return target


def rows_of(target: Target) -> list[dict[str, object]]:
    return pq.read_table(Path(target.scores) / "seed-0_0.parquet").to_pylist()


def test_figures_are_sklearns(tmp_path: Path) -> None:
    target = scored_run(tmp_path)
    figures = evaluate(target, "nut", VIEW)
    rows = rows_of(target)
    labels = [row["label"] != "good" for row in rows]
    assert figures.metrics.image_auroc == pytest.approx(roc_auc_score(labels, [row["score"] for row in rows]))
    truth, maps = [], []
    for row in rows:
        mask = np.zeros((48, 40), bool)
        if row["mask"]:
            with Image.open(str(row["mask"])) as image:
                mask = np.asarray(image) > 0
        truth.append(images.resize_mask(mask, VIEW))
        maps.append(np.frombuffer(row["anomaly_map"], np.float32))  # type: ignore[call-overload]
    assert figures.metrics.pixel_auroc == pytest.approx(roc_auc_score(np.ravel(truth), np.ravel(maps)))
    assert figures.metrics.pixel_auroc > 0.6
    expected = average_precision_score(np.ravel(truth), np.ravel(maps))
    assert figures.metrics.pixel_average_precision == pytest.approx(expected)
    scores, flags = np.array([row["score"] for row in rows]), np.array(labels)
    verdicts = np.array([row["is_anomalous"] for row in rows])
    assert figures.metrics.image_average_precision == pytest.approx(average_precision_score(labels, scores))
    assert figures.metrics.image_f1_max == pytest.approx(max(f1_score(labels, scores >= at) for at in scores))
    assert figures.metrics.image_recall == pytest.approx(verdicts[flags].mean())
    assert figures.metrics.image_false_alarm_rate == pytest.approx(verdicts[~flags].mean())
    assert None not in dataclasses.asdict(figures.metrics).values()
    assert (figures.good_count, figures.defect_count, figures.error_count) == (6, 6, 0)
    assert (figures.undefined, figures.problems) == ({}, ())


def test_without_masks_pixels_are_undefined_and_that_is_no_failure(tmp_path: Path) -> None:
    figures = evaluate(scored_run(tmp_path, masks=False), "nut", VIEW)
    assert figures.metrics.image_auroc is not None
    assert figures.metrics.pixel_auroc is None
    assert figures.undefined == {name: "no masks" for name in METRICS if name.startswith("pixel")}
    assert figures.problems == ()


def test_a_mask_whose_size_differs_is_named_and_images_still_count(tmp_path: Path) -> None:
    target = scored_run(tmp_path)
    mask = tmp_path / "data/nut/ground_truth/square/002_mask.png"
    mask.write_bytes(encoded(np.zeros((10, 20), np.uint8)))
    figures = evaluate(target, "nut", VIEW)
    assert figures.metrics.image_auroc is not None
    assert figures.metrics.pixel_auroc is None
    assert figures.problems == (figures.undefined["pixel_auroc"],)
    assert f"mask {mask} is 20×10, its image" in figures.problems[0]
    assert "square/002.png 40×48" in figures.problems[0]


@pytest.mark.parametrize("content", [None, b"no image"])
def test_a_mask_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    target = scored_run(tmp_path)
    mask = tmp_path / "data/nut/ground_truth/square/002_mask.png"
    mask.unlink() if content is None else mask.write_bytes(content)
    assert str(mask) in evaluate(target, "nut", VIEW).problems[0]


def test_error_rows_are_problems_and_do_not_count(tmp_path: Path) -> None:
    figures = evaluate(scored_run(tmp_path, broken=2), "nut", VIEW)
    assert (figures.good_count, figures.defect_count, figures.error_count) == (4, 6, 2)
    assert len(figures.problems) == 2
    assert "test/good/000.png: damaged: cut off" in figures.problems[0]


def test_a_category_of_defects_alone_is_undefined(tmp_path: Path) -> None:
    figures = evaluate(scored_run(tmp_path, broken=6), "nut", VIEW)
    assert figures.metrics.image_auroc is None
    assert figures.undefined["image_auroc"] == "no good ones among 6"
    assert figures.metrics.image_recall is not None
    assert (figures.metrics.image_false_alarm_rate, figures.undefined["image_false_alarm_rate"]) == (
        None,
        "no good ones",
    )


def test_the_gallery_shows_four_defects(tmp_path: Path) -> None:
    picture = gallery(scored_run(tmp_path), "nut", VIEW)
    assert picture
    with Image.open(io.BytesIO(picture)) as image:
        assert image.size == (2 * 520 + 24, 2 * 278 + 24)
        # The second half of each cell is the overlay.
        assert image.getpixel((8 + 256 + 8 + 100, 8 + 100)) == (99, 99, 99)
    target = Target.among(str(tmp_path / "run"), "seed-0")
    assert gallery(target, "no-such-category", VIEW) is None


def result(category: str, seed: int, image: float | None, pixel: float | None) -> Result:
    record = ModelRecord(
        category=category,
        recipe=dataclasses.replace(TINY, seed=seed),
        precision="float32",
        teacher_digest="t",
        data_fingerprint="d",
        heatmap_scale=HeatmapScale(0.1, 1.0),
        fit=FitSummary(2.0 + seed, 3, 2, 0.5, 0.6, 8, 2, 2, "cpu"),
        files={"student.safetensors": f"{seed}" * 64},
        versions={},
        created="now",
    )
    undefined = {} if pixel is not None else {"pixel_auroc": "no masks"}
    return Result(record, Figures(Metrics(image_auroc=image, pixel_auroc=pixel), 4, 5, 0, undefined=undefined))


REPORT = Report(
    "data",
    TINY,
    [result("b", 0, 0.5, None), result("a", 1, 0.75, 0.9), result("a", 0, 0.25, 0.7)],
    [Failure("c", "/data/c: no images")],
)


def test_the_report_averages_over_seeds_and_then_over_categories() -> None:
    report = json.loads(json.dumps(REPORT.as_json(), allow_nan=False))
    a, b = report["categories"]["a"], report["categories"]["b"]
    assert (a["image_auroc"], a["pixel_auroc"], a["fit_seconds"]) == (0.5, pytest.approx(0.8), 2.5)
    assert a["image_auroc_std"] == pytest.approx(np.std([0.25, 0.75], ddof=1))
    assert (b["image_auroc"], b["image_auroc_std"], b["pixel_auroc"]) == (0.5, None, None)
    assert b["undefined"] == {"pixel_auroc": "no masks"}
    assert report["mean"]["image_auroc"] == 0.5
    assert report["mean"]["pixel_auroc"] == pytest.approx(0.8)
    assert list(a["seeds"]) == ["0", "1"]
    assert a["seeds"]["1"]["model_id"] == "a-111111111111"
    assert report["failures"] == [{"category": "c", "reason": "/data/c: no images"}]


def test_the_table_has_a_row_per_category_and_seed(tmp_path: Path) -> None:
    REPORT.write(str(tmp_path))
    rows = pq.read_table(tmp_path / "report.parquet").to_pylist()
    assert [(row["category"], row["seed"], row["image_auroc"]) for row in rows] == [
        ("a", 0, 0.25),
        ("a", 1, 0.75),
        ("b", 0, 0.5),
    ]
    assert json.loads((tmp_path / "report.json").read_text())["mean"]["categories"] == 2


def test_the_printed_table_says_all_of_it() -> None:
    text = REPORT.as_text()
    assert "0.5000 ± 0.3536" in text
    assert "b: pixel_auroc undefined: no masks" in text
    assert "c: failed: /data/c: no images" in text


def test_a_report_of_nothing_is_a_report() -> None:
    empty = Report("data", TINY, [], [Failure("c", "gone")])
    assert empty.as_text() == "c: failed: gone"
    assert empty.as_json()["mean"]["image_auroc"] is None
    assert pq.read_table(io.BytesIO(empty.as_parquet())).num_rows == 0
