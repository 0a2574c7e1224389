from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.ndimage import zoom
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from stpm import images
from stpm.evaluation.category import METRICS, MasksAt, evaluate
from stpm.evaluation.gallery import galleries, sheet
from stpm.preprocessing import Resize
from stpm.scoring.target import Target
from tests.conftest import preprocessing_of
from tests.datasets import encoded
from tests.evaluation.runs import PREPROCESSING, SIZE, scored_run


def rows_of(target: Target) -> list[dict[str, object]]:
    return pq.read_table(Path(target.scores) / "seed-0_0.parquet").to_pylist()


def mask_of(row: dict[str, object]) -> np.ndarray:
    if not row["mask"]:
        return np.zeros((48, 40), bool)
    with Image.open(str(row["mask"])) as image:
        return np.asarray(image) > 0


def resized_mask(row: dict[str, object]) -> np.ndarray:
    return images.resize_mask(mask_of(row), PREPROCESSING)


def test_figures_are_sklearns(tmp_path: Path) -> None:
    target = scored_run(tmp_path)
    figures = evaluate(target, "nut", PREPROCESSING)
    rows = rows_of(target)
    labels = [row["label"] != "good" for row in rows]
    assert figures.metrics.image_auroc == pytest.approx(roc_auc_score(labels, [row["score"] for row in rows]))
    truth = [resized_mask(row) for row in rows]
    maps = [np.frombuffer(row["anomaly_map"], np.float32) for row in rows]  # type: ignore[call-overload]
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
    figures = evaluate(scored_run(tmp_path, masks=False), "nut", PREPROCESSING)
    assert figures.metrics.image_auroc is not None
    assert figures.metrics.pixel_auroc is None
    assert figures.undefined == {name: "no masks" for name in METRICS if name.startswith("pixel")}
    assert figures.problems == ()


def test_a_mask_whose_size_differs_is_named_and_images_still_count(tmp_path: Path) -> None:
    target = scored_run(tmp_path)
    mask = tmp_path / "data/nut/ground_truth/square/002_mask.png"
    mask.write_bytes(encoded(np.zeros((10, 20), np.uint8)))
    figures = evaluate(target, "nut", PREPROCESSING)
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
    assert str(mask) in evaluate(target, "nut", PREPROCESSING).problems[0]


def test_error_rows_are_problems_and_do_not_count(tmp_path: Path) -> None:
    figures = evaluate(scored_run(tmp_path, broken=2), "nut", PREPROCESSING)
    assert (figures.good_count, figures.defect_count, figures.error_count) == (4, 6, 2)
    assert len(figures.problems) == 2
    assert "test/good/000.png: damaged: cut off" in figures.problems[0]


def test_a_category_of_defects_alone_is_undefined(tmp_path: Path) -> None:
    figures = evaluate(scored_run(tmp_path, broken=6), "nut", PREPROCESSING)
    assert figures.metrics.image_auroc is None
    assert figures.undefined["image_auroc"] == "no good ones among 6"
    assert figures.metrics.image_recall is not None
    assert (figures.metrics.image_false_alarm_rate, figures.undefined["image_false_alarm_rate"]) == (
        None,
        "no good ones",
    )


def test_the_gallery_shows_four_defects(tmp_path: Path) -> None:
    picture = sheet(scored_run(tmp_path), "nut", PREPROCESSING)
    assert picture
    with Image.open(io.BytesIO(picture)) as image:
        assert image.size == (2 * 520 + 24, 2 * 278 + 24)
        # The second half of each cell is half image, of some grey, and half heatmap, of the palette's last red.
        red, green, blue = image.getpixel((8 + 256 + 8 + 200, 8 + 200))  # type: ignore[misc]
        assert 100 < red < 135
        assert max(green, blue) < 70
    target = Target.among(str(tmp_path / "run"), "seed-0")
    assert sheet(target, "no-such-category", PREPROCESSING) is None


def test_each_defect_type_is_measured_against_all_good_images(tmp_path: Path) -> None:
    target = scored_run(tmp_path, types=("scratch", "dent"))
    figures = evaluate(target, "nut", PREPROCESSING)
    rows = rows_of(target)
    assert sorted(figures.defects) == ["dent", "scratch"]
    for name, found in figures.defects.items():
        chosen = [row for row in rows if row["label"] in ("good", name)]
        labels, scores = [row["label"] == name for row in chosen], [row["score"] for row in chosen]
        assert (found.good_count, found.defect_count) == (6, 3)
        assert found.metrics.image_auroc == pytest.approx(roc_auc_score(labels, scores))
        maps = [np.frombuffer(row["anomaly_map"], np.float32) for row in chosen]  # type: ignore[call-overload]
        truth = [resized_mask(row).ravel() for row in chosen]
        assert found.metrics.pixel_auroc == pytest.approx(roc_auc_score(np.ravel(truth), np.ravel(maps)))
        assert found.intervals.keys() == {metric for metric in METRICS if metric.startswith("image")}


def test_masks_may_be_compared_at_their_own_size(tmp_path: Path) -> None:
    target = scored_run(tmp_path)
    figures = evaluate(target, "nut", PREPROCESSING, masks_at="original")
    truth, maps = [], []
    for row in rows_of(target):
        truth.append(mask_of(row))
        anomaly_map = np.frombuffer(row["anomaly_map"], np.float32).reshape(SIZE, SIZE)  # type: ignore[call-overload]
        maps.append(images.resize_map(anomaly_map, 48, 40))
    assert figures.metrics.pixel_auroc == pytest.approx(roc_auc_score(np.ravel(truth), np.ravel(maps)))
    assert figures.metrics.pixel_auroc != evaluate(target, "nut", PREPROCESSING).metrics.pixel_auroc


@pytest.mark.parametrize("resize", ["crop", "fit"])
@pytest.mark.parametrize("masks_at", ["model", "original"])
def test_pixels_are_those_that_the_model_saw(tmp_path: Path, resize: Resize, masks_at: MasksAt) -> None:
    """Images of 40 × 48 in an input of 96 × 64: cut to their middle, or with padding that is in no figure."""
    made = preprocessing_of(96, 64, resize)
    target = scored_run(tmp_path, preprocessing=made)
    truth, maps = [], []
    for row in rows_of(target):
        shape = (96, 64) if resize == "crop" else (77, 64)
        anomaly_map = np.frombuffer(row["anomaly_map"], np.float32).reshape(shape)  # type: ignore[call-overload]
        mask = mask_of(row)[:, 4:36] if resize == "crop" else mask_of(row)
        if masks_at == "original":
            maps.append(np.asarray(Image.fromarray(anomaly_map).resize(mask.shape[::-1], Image.Resampling.BILINEAR)))
            truth.append(mask)
        else:
            maps.append(anomaly_map)
            truth.append(np.asarray(Image.fromarray(mask).resize(shape[::-1], Image.Resampling.NEAREST)))
    found = evaluate(target, "nut", made, masks_at).metrics
    assert found.pixel_auroc == pytest.approx(roc_auc_score(np.ravel(truth), np.ravel(maps)))
    assert found.image_auroc is not None


def test_a_map_is_enlarged_linearly() -> None:
    small = np.random.default_rng(0).random((8, 8), np.float32)
    large = images.resize_map(small, 80, 80)
    expected = zoom(small, 10, order=1, mode="nearest", grid_mode=True)
    assert large == pytest.approx(expected, abs=1e-5)


def test_images_without_a_label_do_not_count(tmp_path: Path) -> None:
    figures = evaluate(scored_run(tmp_path, unlabelled=2), "nut", PREPROCESSING)
    assert (figures.good_count, figures.unlabelled_count) == (4, 2)
    assert None not in dataclasses.asdict(figures.metrics).values()


def test_without_maps_images_still_count(tmp_path: Path) -> None:
    figures = evaluate(scored_run(tmp_path, maps=False), "nut", PREPROCESSING)
    assert figures.metrics.image_auroc is not None
    assert figures.undefined["pixel_aupro"] == "no anomaly maps; score with --raw-maps"


def test_galleries_show_what_was_missed_and_what_was_wrongly_called(tmp_path: Path) -> None:
    target = scored_run(tmp_path)
    rows = {str(row["uri"]): row for row in rows_of(target)}
    found = galleries(target, "nut", PREPROCESSING, most=20)
    largest = [tile.score for tile in found["Largest scores"]]
    assert largest == sorted((row["score"] for row in rows.values()), reverse=True)  # type: ignore[type-var]
    missed = {uri for uri, row in rows.items() if row["label"] != "good" and not row["is_anomalous"]}
    assert {tile.uri for tile in found["Missed defects"]} == missed
    alarms = {uri for uri, row in rows.items() if row["label"] == "good" and row["is_anomalous"]}
    assert {tile.uri for tile in found["False alarms"]} == alarms
    with Image.open(io.BytesIO(found["Largest scores"][0].picture)) as image:
        assert (image.format, image.size) == ("JPEG", (328, 160))


def test_an_image_that_is_gone_leaves_the_gallery_and_not_the_figures(tmp_path: Path) -> None:
    target = scored_run(tmp_path)
    for row in rows_of(target)[:3]:
        Path(str(row["uri"])).unlink()
    assert len(galleries(target, "nut", PREPROCESSING, most=20)["Largest scores"]) == 9
    assert evaluate(target, "nut", PREPROCESSING).good_count == 6
