"""A category's metrics, and the charts of its scores."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from stpm.errors import RunDamagedError
from stpm.evaluation.category import MasksAt, ScoredCategory, read_scores
from stpm.evaluation.charts import draw_charts, histogram_bins, roc_curves
from stpm.evaluation.report import Report
from stpm.method.preprocessing import Resize
from stpm.metrics.category_metrics import METRICS, measure_category
from tests.conftest import make_preprocessing
from tests.datasets import encode_image, with_column, write_rows
from tests.evaluation.runs import measured, result, scored_run

PIXEL_METRICS = [name for name in METRICS if name.startswith("pixel")]


def rows_of(category: ScoredCategory) -> list[dict[str, Any]]:
    return pq.read_table(Path(category.output.scores) / "seed-0_0.parquet").to_pylist()


def mask_of(row: dict[str, Any]) -> np.ndarray:
    if not row["mask"]:
        return np.zeros((48, 40), bool)
    with Image.open(row["mask"]) as image:
        return np.asarray(image) > 0


def resized(values: np.ndarray, shape: tuple[int, int], resampling: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(values).resize(shape[::-1], resampling)).ravel()


def test_image_metrics_agree_with_sklearn_also_of_a_defect_type_and_all_good_images(tmp_path: Path) -> None:
    category = scored_run(tmp_path, types=("scratch", "dent"))
    metrics, rows = measured(category), rows_of(category)
    assert sorted(metrics.defects) == ["dent", "scratch"]
    assert (metrics.good_count, metrics.defect_count, metrics.error_count) == (6, 6, 0)
    assert (metrics.undefined, metrics.problems) == ({}, ())
    for name, found in {"": metrics, **metrics.defects}.items():
        chosen = [row for row in rows if row["label"] == "good" or not name or row["label"] == name]
        assert (found.good_count, found.defect_count) == (6, 3 if name else 6)
        called = [row["label"] for row in chosen if row["is_anomalous"]]
        assert (found.found_count, found.false_alarm_count) == (
            len(called) - called.count("good"),
            called.count("good"),
        )
        is_defect = np.array([row["label"] != "good" for row in chosen])
        scores, is_anomalous = (np.array([row[column] for row in chosen]) for column in ("score", "is_anomalous"))
        expected = {
            "image_auroc": roc_auc_score(is_defect, scores),
            "image_average_precision": average_precision_score(is_defect, scores),
            "image_f1_max": max(f1_score(is_defect, scores >= at) for at in scores),
            "image_recall": is_anomalous[is_defect].mean(),
            "image_false_alarm_rate": is_anomalous[~is_defect].mean(),
        }
        assert {metric: found.values[metric] for metric in expected} == pytest.approx(expected)
        assert all(found.metrics[metric].interval for metric in expected)
        truth = [resized(mask_of(row), (64, 64), Image.Resampling.NEAREST) for row in chosen]
        maps = [np.frombuffer(row["anomaly_map"], np.float32) for row in chosen]
        assert found.values["pixel_auroc"] == pytest.approx(roc_auc_score(np.ravel(truth), np.ravel(maps)))
        assert None not in found.values.values()


@pytest.mark.parametrize(
    ("height", "width", "resize", "content"),
    [(64, 64, "stretch", (64, 64)), (96, 64, "crop", (96, 64)), (96, 64, "fit", (77, 64))],
)
@pytest.mark.parametrize("masks_at", ["model", "original"])
def test_the_pixels_that_the_model_sees_are_compared_at_either_size(
    tmp_path: Path, height: int, width: int, resize: Resize, content: tuple[int, int], masks_at: MasksAt
) -> None:
    """Images of 40 × 48 are stretched, cropped to their middle, or padded; padding is not counted."""
    category = scored_run(tmp_path, preprocessing=make_preprocessing(height, width, resize))
    truth, maps = [], []
    for row in rows_of(category):
        anomaly_map = np.frombuffer(row["anomaly_map"], np.float32).reshape(content)
        mask = mask_of(row)[:, 4:36] if resize == "crop" else mask_of(row)
        shape = mask.shape if masks_at == "original" else content
        maps.append(resized(anomaly_map, shape, Image.Resampling.BILINEAR))
        truth.append(resized(mask, shape, Image.Resampling.NEAREST))
    found = measured(category, masks_at).values["pixel_auroc"]
    assert found == pytest.approx(roc_auc_score(np.ravel(truth), np.ravel(maps)))
    assert found > 0.5


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"masks": False}, "no masks"), ({"maps": False}, "no anomaly maps; score with --raw-maps")],
)
def test_without_masks_or_maps_no_pixel_is_measured(tmp_path: Path, options: dict[str, bool], reason: str) -> None:
    metrics = measured(scored_run(tmp_path, **options))  # type: ignore[arg-type]
    assert metrics.values["image_auroc"] is not None
    assert metrics.undefined == dict.fromkeys(PIXEL_METRICS, reason)
    assert metrics.problems == ()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "no such file"),
        (b"no image", "8 bytes whose beginning is not"),
        (encode_image(np.zeros((10, 20), np.uint8)), "is 20×10, its image .*square/002.png 40×48"),
    ],
)
def test_an_unreadable_mask_is_a_problem_of_pixel_metrics(tmp_path: Path, content: bytes | None, problem: str) -> None:
    category = scored_run(tmp_path)
    mask = tmp_path / "data/nut/ground_truth/square/002_mask.png"
    mask.unlink() if content is None else mask.write_bytes(content)
    metrics = measured(category)
    assert metrics.values["image_auroc"] is not None
    assert metrics.problems == (metrics.undefined["pixel_auroc"],)
    assert re.search(f"^mask {mask} .*{problem}", metrics.problems[0])


def test_a_mask_that_vanishes_at_model_size_is_reported(tmp_path: Path) -> None:
    category = scored_run(tmp_path, preprocessing=make_preprocessing(16))
    mask = tmp_path / "data/nut/ground_truth/square/002_mask.png"
    pixels = np.zeros((48, 40), np.uint8)
    # Nearest neighbour takes every third row.
    pixels[9:12, 20] = [255, 0, 255]
    mask.write_bytes(encode_image(pixels))
    metrics = measured(category)
    assert metrics.vanished_masks == (str(mask),)
    assert metrics.problems == ()
    assert measured(category, "original").vanished_masks == ()
    report = Report("data", [dataclasses.replace(result("nut", 0, 1.0, 1.0), metrics=metrics)])
    note = f"nut: 1 masks vanish at model size, and no pixel metric counts their defects: {mask}; give --masks-at orig"
    assert note in report.text()
    assert note in report.page()
    assert report.contents["notes"] == report.notes


def test_errors_are_problems_and_neither_they_nor_images_without_a_label_count(tmp_path: Path) -> None:
    metrics = measured(scored_run(tmp_path / "broken", broken=2))
    assert (metrics.good_count, metrics.defect_count, metrics.error_count) == (4, 6, 2)
    assert len(metrics.problems) == 2
    assert "test/good/000.png: damaged: cut off" in metrics.problems[0]
    metrics = measured(scored_run(tmp_path / "unlabelled", unlabelled=2))
    assert (metrics.good_count, metrics.unlabelled_count) == (4, 2)
    assert None not in metrics.values.values()


def test_a_category_of_defects_alone_is_undefined(tmp_path: Path) -> None:
    metrics = measured(scored_run(tmp_path, broken=6))
    assert metrics.values["image_recall"] is not None
    assert metrics.undefined["image_auroc"] == "no good ones among 6"
    assert metrics.undefined["image_false_alarm_rate"] == "no good ones"
    assert metrics.values["image_auroc"] is metrics.values["image_false_alarm_rate"] is None


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("anomaly_map", b"\0" * 100, "the anomaly map of .* is not of its image's size"),
        ("anomaly_map", b"\0" * 101, "the anomaly map of .* is not of its image's size"),
        *((name, None, f"the row of .* has neither an error nor a {name}") for name in ("width", "score", "threshold")),
    ],
)
def test_a_wrong_value_of_a_row_names_the_folder(tmp_path: Path, column: str, value: object, problem: str) -> None:
    category = scored_run(tmp_path)
    rows = pq.read_table(Path(category.output.scores) / "seed-0_0.parquet")
    write_rows(category.output, with_column(rows, column, [*rows[column].to_pylist()[:-1], value]))
    with pytest.raises(RunDamagedError, match=rf"^{category.output.scores}: {problem}"):
        measured(category)


def test_curves_have_the_area_of_their_metric(tmp_path: Path) -> None:
    scores = read_scores(scored_run(tmp_path))
    values = measure_category(scores).values
    areas = {name: np.trapezoid(y, x) for name, (x, y) in roc_curves(scores).items()}
    assert areas["image ROC"] == pytest.approx(values["image_auroc"])
    assert areas["pixel ROC"] == pytest.approx(values["pixel_auroc"])
    assert areas["PRO to 0.3"] / 0.3 == pytest.approx(values["pixel_aupro"])
    # A chart that would be empty is not drawn.
    assert draw_charts(read_scores(scored_run(tmp_path / "broken", broken=12)), {}, 0, "salt") == {}


@pytest.mark.parametrize("scores", [[1e-6, 1e-3, 1.0], [0.5, 0.6, 0.7], [-1.0, 0.0, 5.0], [2.0, 2.0, 2.0]])
def test_the_bins_hold_every_score_and_the_threshold(scores: list[float]) -> None:
    edges, logarithmic = histogram_bins(np.array(scores, np.float32), threshold=2.0)
    assert logarithmic == (scores[0] == 1e-6)
    assert np.histogram(np.array([*scores, 2.0], np.float32), edges)[0].sum() == 4
