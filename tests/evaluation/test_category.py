from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.ndimage import zoom
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from stpm.data.heatmaps import resize_map
from stpm.data.masks import resize_mask
from stpm.errors import RunDamagedError
from stpm.evaluation.category import MasksAt, ScoredCategory
from stpm.evaluation.report import Report
from stpm.method.preprocessing import Resize
from stpm.metrics.category_metrics import METRICS
from tests.conftest import make_preprocessing
from tests.datasets import encode_image, write_rows
from tests.evaluation.runs import PREPROCESSING, SIZE, measured, result, scored_run


def rows_of(category: ScoredCategory) -> list[dict[str, object]]:
    return pq.read_table(Path(category.output.scores) / "seed-0_0.parquet").to_pylist()


def mask_of(row: dict[str, object]) -> np.ndarray:
    if not row["mask"]:
        return np.zeros((48, 40), bool)
    with Image.open(str(row["mask"])) as image:
        return np.asarray(image) > 0


def resized_mask(row: dict[str, object]) -> np.ndarray:
    return resize_mask(mask_of(row), PREPROCESSING)


def test_metrics_agree_with_sklearn(tmp_path: Path) -> None:
    category = scored_run(tmp_path)
    metrics = measured(category)
    rows = rows_of(category)
    labels = [row["label"] != "good" for row in rows]
    assert metrics.values["image_auroc"] == pytest.approx(roc_auc_score(labels, [row["score"] for row in rows]))
    truth = [resized_mask(row) for row in rows]
    maps = [np.frombuffer(row["anomaly_map"], np.float32) for row in rows]  # type: ignore[call-overload]
    assert metrics.values["pixel_auroc"] == pytest.approx(roc_auc_score(np.ravel(truth), np.ravel(maps)))
    assert metrics.values["pixel_auroc"] > 0.6
    expected = average_precision_score(np.ravel(truth), np.ravel(maps))
    assert metrics.values["pixel_average_precision"] == pytest.approx(expected)
    scores, flags = np.array([row["score"] for row in rows]), np.array(labels)
    is_anomalous = np.array([row["is_anomalous"] for row in rows])
    assert metrics.values["image_average_precision"] == pytest.approx(average_precision_score(labels, scores))
    assert metrics.values["image_f1_max"] == pytest.approx(max(f1_score(labels, scores >= at) for at in scores))
    assert metrics.values["image_recall"] == pytest.approx(is_anomalous[flags].mean())
    assert metrics.values["image_false_alarm_rate"] == pytest.approx(is_anomalous[~flags].mean())
    assert None not in metrics.values.values()
    assert (metrics.good_count, metrics.defect_count, metrics.error_count) == (6, 6, 0)
    assert (metrics.undefined, metrics.problems) == ({}, ())


def test_without_masks_pixel_metrics_are_undefined_without_a_failure(tmp_path: Path) -> None:
    metrics = measured(scored_run(tmp_path, masks=False))
    assert metrics.values["image_auroc"] is not None
    assert metrics.values["pixel_auroc"] is None
    assert metrics.undefined == {name: "no masks" for name in METRICS if name.startswith("pixel")}
    assert metrics.problems == ()


def test_a_mask_of_another_size_is_a_problem_and_image_metrics_remain(tmp_path: Path) -> None:
    category = scored_run(tmp_path)
    mask = tmp_path / "data/nut/ground_truth/square/002_mask.png"
    mask.write_bytes(encode_image(np.zeros((10, 20), np.uint8)))
    metrics = measured(category)
    assert metrics.values["image_auroc"] is not None
    assert metrics.values["pixel_auroc"] is None
    assert metrics.problems == (metrics.undefined["pixel_auroc"],)
    assert f"mask {mask} is 20×10, its image" in metrics.problems[0]
    assert "square/002.png 40×48" in metrics.problems[0]


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
    made = dataclasses.replace(result("nut", 0, 1.0, 1.0), metrics=metrics)
    report = Report("data", [made])
    note = f"nut: 1 masks vanish at model size, and no pixel metric counts their defects: {mask}; give --masks-at orig"
    assert note in report.text()
    assert note in report.page()
    assert report.contents["notes"] == report.notes


@pytest.mark.parametrize("content", [None, b"no image"])
def test_an_unreadable_mask_is_a_problem(tmp_path: Path, content: bytes | None) -> None:
    category = scored_run(tmp_path)
    mask = tmp_path / "data/nut/ground_truth/square/002_mask.png"
    mask.unlink() if content is None else mask.write_bytes(content)
    assert str(mask) in measured(category).problems[0]


def test_error_rows_are_problems_and_do_not_count(tmp_path: Path) -> None:
    metrics = measured(scored_run(tmp_path, broken=2))
    assert (metrics.good_count, metrics.defect_count, metrics.error_count) == (4, 6, 2)
    assert len(metrics.problems) == 2
    assert "test/good/000.png: damaged: cut off" in metrics.problems[0]


def test_a_category_of_defects_alone_is_undefined(tmp_path: Path) -> None:
    metrics = measured(scored_run(tmp_path, broken=6))
    assert metrics.values["image_auroc"] is None
    assert metrics.undefined["image_auroc"] == "no good ones among 6"
    assert metrics.values["image_recall"] is not None
    assert (metrics.values["image_false_alarm_rate"], metrics.undefined["image_false_alarm_rate"]) == (
        None,
        "no good ones",
    )


def test_each_defect_type_is_measured_against_all_good_images(tmp_path: Path) -> None:
    category = scored_run(tmp_path, types=("scratch", "dent"))
    metrics = measured(category)
    rows = rows_of(category)
    assert sorted(metrics.defects) == ["dent", "scratch"]
    for name, found in metrics.defects.items():
        chosen = [row for row in rows if row["label"] in ("good", name)]
        labels, scores = [row["label"] == name for row in chosen], [row["score"] for row in chosen]
        assert (found.good_count, found.defect_count) == (6, 3)
        assert found.values["image_auroc"] == pytest.approx(roc_auc_score(labels, scores))
        maps = [np.frombuffer(row["anomaly_map"], np.float32) for row in chosen]  # type: ignore[call-overload]
        truth = [resized_mask(row).ravel() for row in chosen]
        assert found.values["pixel_auroc"] == pytest.approx(roc_auc_score(np.ravel(truth), np.ravel(maps)))
        assert all(found.metrics[name].interval for name in METRICS if name.startswith("image"))


def test_pixels_are_compared_at_original_size_on_request(tmp_path: Path) -> None:
    category = scored_run(tmp_path)
    metrics = measured(category, "original")
    truth, maps = [], []
    for row in rows_of(category):
        truth.append(mask_of(row))
        anomaly_map = np.frombuffer(row["anomaly_map"], np.float32).reshape(SIZE, SIZE)  # type: ignore[call-overload]
        maps.append(resize_map(anomaly_map, 48, 40))
    assert metrics.values["pixel_auroc"] == pytest.approx(roc_auc_score(np.ravel(truth), np.ravel(maps)))
    assert metrics.values["pixel_auroc"] != measured(category).values["pixel_auroc"]


@pytest.mark.parametrize("resize", ["crop", "fit"])
@pytest.mark.parametrize("masks_at", ["model", "original"])
def test_pixels_outside_the_models_input_are_not_counted(tmp_path: Path, resize: Resize, masks_at: MasksAt) -> None:
    """Images of 40 × 48 in an input of 96 × 64 are cropped to their middle, or padded."""
    made = make_preprocessing(96, 64, resize)
    category = scored_run(tmp_path, preprocessing=made)
    truth, maps = [], []
    for row in rows_of(category):
        shape = (96, 64) if resize == "crop" else (77, 64)
        anomaly_map = np.frombuffer(row["anomaly_map"], np.float32).reshape(shape)  # type: ignore[call-overload]
        mask = mask_of(row)[:, 4:36] if resize == "crop" else mask_of(row)
        if masks_at == "original":
            maps.append(np.asarray(Image.fromarray(anomaly_map).resize(mask.shape[::-1], Image.Resampling.BILINEAR)))
            truth.append(mask)
        else:
            maps.append(anomaly_map)
            truth.append(np.asarray(Image.fromarray(mask).resize(shape[::-1], Image.Resampling.NEAREST)))
    found = measured(category, masks_at).values
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(np.ravel(truth), np.ravel(maps)))
    assert found["image_auroc"] is not None


def test_a_map_is_enlarged_linearly() -> None:
    small = np.random.default_rng(0).random((8, 8), np.float32)
    large = resize_map(small, 80, 80)
    expected = zoom(small, 10, order=1, mode="nearest", grid_mode=True)
    assert large == pytest.approx(expected, abs=1e-5)


def test_images_without_a_label_do_not_count(tmp_path: Path) -> None:
    metrics = measured(scored_run(tmp_path, unlabelled=2))
    assert (metrics.good_count, metrics.unlabelled_count) == (4, 2)
    assert None not in metrics.values.values()


def test_a_file_without_a_column_of_maps_is_damaged(tmp_path: Path) -> None:
    category = scored_run(tmp_path)
    rows = pq.read_table(Path(category.output.scores) / "seed-0_0.parquet")
    write_rows(category.output, rows.drop_columns(["anomaly_map"]), 1)
    with pytest.raises(RunDamagedError, match=r"seed-0_1\.parquet is not a file of rows: it has no column anomaly_map"):
        measured(category)


def test_without_maps_image_metrics_remain(tmp_path: Path) -> None:
    metrics = measured(scored_run(tmp_path, maps=False))
    assert metrics.values["image_auroc"] is not None
    assert metrics.undefined["pixel_aupro"] == "no anomaly maps; score with --raw-maps"


@pytest.mark.parametrize(
    ("column", "values", "problem"),
    [
        ("anomaly_map", [b"\0" * 100], "the anomaly map of .* is not of its image's size"),
        ("anomaly_map", [b"\0" * 101], "the anomaly map of .* is not of its image's size"),
        *(
            (name, [None], f"the row of .* has neither an error nor a {name}")
            for name in ("width", "score", "threshold")
        ),
    ],
)
def test_a_wrong_value_of_a_scored_row_names_the_folder(
    tmp_path: Path, column: str, values: list[object], problem: str
) -> None:
    category = scored_run(tmp_path)
    rows = pq.read_table(Path(category.output.scores) / "seed-0_0.parquet")
    index = rows.schema.get_field_index(column)
    changed = pa.array([*rows[column].to_pylist()[:-1], *values], rows.schema.field(column).type)
    write_rows(category.output, rows.set_column(index, rows.schema.field(column), changed))
    with pytest.raises(RunDamagedError, match=rf"^{category.output.scores}: {problem}"):
        measured(category)
