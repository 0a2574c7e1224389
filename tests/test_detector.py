"""The detector that a person holds gives what the jobs write, and takes what a person has."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import stpm
from stpm import detector as detectors
from stpm import storage
from stpm.data import mvtec
from stpm.data.decoding import decode
from stpm.data.masks import decode_mask, resize_mask
from stpm.data.pictures import Picture
from stpm.detector import Detector
from stpm.errors import ConfigError, DataError, ModelError
from stpm.fitting.fit_category import fit_category
from stpm.jobs.models import run_models
from stpm.method.arithmetic import Arithmetic
from stpm.method.recipe import PRESETS, Recipe, StudentKind
from stpm.method.teacher import Teacher
from stpm.method.teacher_weights import load_teacher_weights
from stpm.models.options import ModelsOptions
from stpm.models.store import ModelStore
from stpm.options import Backend, Heatmaps, Integers, Names
from stpm.result import Request
from stpm.shared_teachers import TeacherSpec, load_teacher
from tests.conftest import MODELS, REPOSITORY, SETTINGS, TINY, record_calls
from tests.datasets import encode_image, make_category
from tests.fitting.test_fit_category import contents, stored_model, task_in
from tests.method.test_teacher import Operators
from tests.scoring.stages.conftest import run as run  # noqa: PLC0414  a fixture
from tests.scoring.stages.helpers import CATEGORIES, manifest, score

# An image of a run.
GOOD = "data/nut/test/good/000.png"


@pytest.fixture(scope="module")
def nut(run: Path) -> Detector:
    return stpm.load(str(run / "models"), "nut", backend="pytorch")


def test_package_gives_the_detector_without_ray_and_imports_torch_when_it_is_needed() -> None:
    script = "import sys, stpm; light = 'torch' in sys.modules; stpm.fit; stpm.load; print(light, 'ray' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert ran.stdout.split() == ["False", "False"]
    assert {"fit", "load", "Detector", "Result"} <= {*dir(stpm)}
    with pytest.raises(AttributeError, match="no attribute 'fti'"):
        stpm.fti  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("category", CATEGORIES)
def test_scores_are_those_of_the_job_bit_for_bit(run: Path, category: str, rng: np.random.Generator) -> None:
    """The job scores the images of three categories in one batch."""
    rows = manifest(run)
    mixed = score(run, rows.take(rng.permutation(rows.num_rows))).to_pylist()
    written = [row for row in mixed if row["category"] == category]
    detector = stpm.load(str(run / "models"), category, backend="pytorch")
    results = list(detector.score((row["uri"] for row in written), false_alarm_rate=0.3))
    for row, result in zip(written, results, strict=True):
        for name in ("score", "p_value", "threshold", "coarse_score", "fine_score", "area"):
            value = getattr(result, name)
            assert row[name] == (None if value is None else np.float32(value)), name
        assert (row["is_anomalous"], row["model_id"]) == (result.is_anomalous, result.model_id)
        assert (row["peak_x"], row["peak_y"]) == result.peak
        assert row["anomaly_map"] == result.model_map.tobytes()
        assert row["heatmap_levels"] == result.heatmap_scale.apply(result.model_map).tobytes()


def test_a_decided_threshold_is_that_of_detector_and_job_at_any_rate(run: Path, tmp_path: Path, nut: Detector) -> None:
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    rows = manifest(run).filter(np.array([name == "nut" for name in manifest(run)["category"].to_pylist()]))
    before = score(run, rows)
    # Between two scores, and in no float32.
    low, high = np.sort(before["score"].to_numpy())[2:4]
    threshold = (float(low) + float(high)) / 2
    options = ModelsOptions(f"{tmp_path}/models", threshold=Names([f"nut={threshold}"]), by="ann", because="scrap")
    assert run_models(options) == 0
    written = score(tmp_path, rows)
    same = ["uri", "score", "p_value", "peak_x", "heatmap_levels"]
    assert written.select(same) == before.select(same)
    assert {*written["threshold"].to_pylist()} == {float(np.float32(threshold))}
    assert sum(written["is_anomalous"].to_pylist()) == rows.num_rows - 3
    detector = stpm.load(f"{tmp_path}/models", "nut", backend="pytorch")
    for rate in (0.01, 0.9):
        found = list(detector.score(rows["uri"].to_pylist(), false_alarm_rate=rate))
        assert [each.is_anomalous for each in found] == written["is_anomalous"].to_pylist()
        assert [np.float32(each.threshold) for each in found] == written["threshold"].to_pylist()
        assert [np.float32(each.area) for each in found] == written["area"].to_pylist()
    assert repr(detector).endswith(f", threshold {detector.record.decision})")
    assert "threshold" not in repr(nut)
    assert " because: scrap" in repr(detector)
    # A copy in another store keeps it.
    assert detector.save(tmp_path / "other", "bolt").decision == detector.record.decision


def test_the_teacher_runs_once_for_a_batch_of_three_categories(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, rows = record_calls(monkeypatch, Teacher, "__call__"), manifest(run)
    assert {*score(run, rows)["category"].to_pylist()} == {*CATEGORIES}
    assert sum(len(inputs[0]) for _, inputs in passes) == rows.num_rows
    loaded = [stpm.load(str(run / "models"), name) for name in CATEGORIES]
    assert len({detector.teacher for detector in loaded}) == 1


@pytest.mark.parametrize("heatmaps", ["all", "anomalous", "none"])
def test_a_batch_is_copied_twice_and_gives_what_images_have_to_show(
    nut: Detector, run: Path, heatmaps: Heatmaps, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = [each.uri for each in mvtec.read_category(str(run / "data"), "nut").test]
    decoded = [decode(Path(uri).read_bytes(), nut.preprocessing) for uri in uris]
    inputs = nut.teacher.inputs(torch.from_numpy(np.stack([each.pixels for each in decoded])))
    fetched = record_calls(monkeypatch, detectors, "fetch")
    request = Request(0.3, 0.3, heatmaps, maps=False)
    with torch.inference_mode():
        results = nut.score_inputs(inputs, [(each.width, each.height) for each in decoded], request)()()
    alarms, regions = sum(each.is_anomalous for each in results), sum(each.region_count > 0 for each in results)
    assert 0 < alarms < len(results)
    assert 0 < regions < len(results)
    (scalars,), (shown,) = fetched
    assert sum(each.numel() for each in scalars) == 3 * len(results)
    counts = {kind: sum(len(each) for each in shown if each.dtype == kind) for kind in (torch.float32, torch.uint8)}
    drawn = {"all": len(results), "anomalous": alarms, "none": 0}
    assert counts == {torch.float32: regions, torch.uint8: drawn[heatmaps]}
    for each in results:
        assert each.model_map.size == (each.region_count > 0) * 64 * 64
        assert (each.heatmap_levels.size > 0) == (heatmaps == "all" or (heatmaps == "anomalous" and each.is_anomalous))


def test_a_batch_waits_for_no_copy_to_a_device(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is torch's `meta`, which computes nothing; where a copy waits for a GPU, its arguments show."""
    device, store = torch.device("meta"), ModelStore(str(run / "models"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(Teacher, "compute", lambda _, backbone, inputs: backbone(inputs))

    def fetch(tensors: list[torch.Tensor]) -> Callable[[], list[np.ndarray]]:
        arrays = [np.zeros(each.shape, str(each.dtype).removeprefix("torch.")) for each in tensors]
        if tensors[0].dtype == torch.float64:
            arrays[0][:, 2] = 1000.0, -1000.0, -1000.0
        return lambda: arrays

    monkeypatch.setattr(detectors, "fetch", fetch)
    inspected = [b"", np.packbits(np.eye(64, dtype=bool)).tobytes(), b""]
    for category in CATEGORIES:
        model = store.load(category)
        spec = TeacherSpec.of_model(model.record, device, Arithmetic())
        spec = dataclasses.replace(spec, preprocessing=dataclasses.replace(spec.preprocessing, resize="fit"))
        detector = Detector.from_model(model, load_teacher(store, spec))
        # The first batch also copies what is kept for all of them.
        for _ in range(2):
            with torch.no_grad(), Operators() as operators, monkeypatch.context() as patch:
                # With a device, it would wait, too.
                patch.setattr(torch, "tensor", lambda values, dtype=None, make=torch.tensor: make(values, dtype=dtype))
                inputs = detector.teacher.inputs(torch.zeros(3, 64, 64, 3, dtype=torch.uint8))
                sizes, request = [(64, 64), (64, 64), (40, 64)], Request(heatmaps="anomalous")
                results = detector.score_inputs(inputs, sizes, request, inspected=inspected)()()
        assert [each.is_anomalous for each in results] == [True, False, False]
        sent = [call for call in operators.calls if len(call.device_types) > 1]
        assert len(sent) > 3
        assert all(call.name == "_to_copy" and call.options.get("non_blocking") for call in sent)
        assert "_local_scalar_dense" not in {call.name for call in operators.calls}


def test_every_form_of_a_picture_has_the_same_score(nut: Detector, run: Path, rng: np.random.Generator) -> None:
    path = run / GOOD
    with Image.open(path) as image:
        image.load()
        rgb = np.asarray(image)
        forms = (path, str(path), path.as_uri(), path.read_bytes(), image, rgb, np.dstack([rgb, rgb[..., :1]]))
        scores = {nut.score(form).score for form in forms}
    grey = rgb[..., 0]
    alike = {nut.score(form).score for form in (grey, grey[..., None], np.dstack([grey] * 3), grey.astype("u2") * 257)}
    assert len(scores) == len(alike) == 1
    # 16 bits are converted as those of files are.
    wide = rng.integers(0, 2**16, (48, 40), dtype=np.uint16)
    assert nut.score(wide).score == nut.score(wide.astype(">u2")).score == nut.score(encode_image(wide)).score
    colour = rng.integers(0, 2**16, (48, 40, 3), dtype=np.uint16)
    assert nut.score(colour).score == nut.score((colour >> 8).astype(np.uint8)).score


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((8, 8)), "^an array of float64 has no fixed range; give uint8 or uint16"),
        (np.zeros((8, 8, 2), np.uint8), r"^an array of shape \(8, 8, 2\) is no image"),
        (np.zeros((0, 8), np.uint8), r"^an array of shape \(0, 8\) is no image"),
        (None, "^NoneType is no image; give a path, a URI, bytes, a PIL image or an array"),
        (bytearray(b"GIF89a"), "^bytearray is no image"),
        (b"GIF89a", "^6 bytes whose beginning is not that of PNG"),
        ("/nowhere/crack.png", r"^/nowhere/crack.png: no such folder"),
        (Image.new("F", (4, 4)), "^.* 32 bits per pixel has no fixed range"),
    ],
)
def test_a_picture_that_cannot_be_scored_raises_alone_and_is_a_result_among_others(
    nut: Detector, picture: Picture, message: str, run: Path
) -> None:
    with pytest.raises(stpm.ImageError, match=message):
        nut.score(picture)
    good = str(run / GOOD)
    first, second, third = nut.score([good, picture, good])
    assert first.score == third.score == pytest.approx(nut.score(good).score, rel=1e-4)
    assert second.error
    assert np.isnan([second.score, second.p_value, second.threshold]).all()
    for use in (lambda: second.anomaly_map, second.plot):
        with pytest.raises(stpm.ImageError, match=message):
            use()


def test_many_pictures_are_scored_a_few_at_a_time(nut: Detector, rng: np.random.Generator) -> None:
    taken = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal taken
        while True:
            taken += 1
            yield rng.integers(0, 256, (48, 40, 3), dtype=np.uint8)

    results = nut.score(endless())
    for number in range(40):
        next(results)
        assert taken <= number + 1 + 16


def test_the_threshold_follows_the_rate(nut: Detector, run: Path) -> None:
    path = str(run / GOOD)
    scores = np.sort(ModelStore(str(run / "models")).load("nut").calibration.scores)
    assert nut.score(path).threshold == scores[-1]
    assert nut.score(path, false_alarm_rate=0.99).threshold == scores[0]
    for rate in (0, 1, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="false_alarm_rate is"):
            nut.score(path, false_alarm_rate=rate)


def test_the_map_is_in_the_pictures_own_pixels(run: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    make_category(f"{tmp_path}/data", "nut")
    recipe = dataclasses.replace(MODELS["memory"], resize="crop")
    detector = stpm.fit(f"{tmp_path}/data/nut/train/good", recipe, progress=False)
    picture = rng.integers(90, 130, (60, 100, 3), dtype=np.uint8)
    picture[10:20, 50:60] = 255
    found = detector.score(picture)
    # The square in the middle is what the model sees.
    seen = np.zeros((60, 100), bool)
    seen[:, 20:80] = True
    np.testing.assert_array_equal(np.isnan(found.anomaly_map), ~seen)
    row, column = np.unravel_index(np.nanargmax(found.anomaly_map), found.anomaly_map.shape)
    assert np.hypot(row - found.peak[1], column - found.peak[0]) < 3
    axes = found.plot()
    assert [axis.get_images()[0].get_array().shape for axis in axes] == [(60, 100, 3)] * 3
    np.testing.assert_array_equal(axes[0].get_images()[0].get_array(), picture)


@pytest.mark.parametrize("kind", MODELS)
def test_fit_makes_the_bits_that_the_fit_job_makes(tmp_path: Path, kind: str) -> None:
    task = task_in(tmp_path, MODELS[kind].for_image_count(8))
    detector = stpm.fit(f"{tmp_path}/data/nut/train/good", MODELS[kind], backend="pytorch", progress=False)
    saved = detector.save(task.store, "nut")
    assert saved.model_id == f"nut{detector.record.model_id}"
    # The job takes the saved model for its own: it would make the same.
    assert stored_model(task)
    epochs = [] if kind == "memory" else list(range(1, task.recipe.epochs + 1))
    assert detector.history.to_pydict().get("number", []) == epochs
    assert stpm.load(task.store).history == detector.history
    fitted = contents(task)
    job = dataclasses.replace(task, store=f"{tmp_path}/other")
    ModelStore(job.store).put_teacher(load_teacher_weights(job.recipe.teacher, job.recipe.teacher_weights, (1, 2, 3)))
    assert fit_category(job, SETTINGS, lambda event: None).record
    assert contents(job) == fitted


def test_a_loaded_detector_is_saved_with_its_teacher_as_a_new_version(nut: Detector, run: Path, tmp_path: Path) -> None:
    store, path = tmp_path / "models", str(run / "data" / "nut" / "test" / "square" / "000.png")
    stpm.load(str(run / "models"), "grey").save(store, "bolt")
    nut.save(store, "bolt")
    versions = ModelStore(str(store)).versions("bolt")
    assert len(versions.previous) == 1
    copied = stpm.load(store, backend="pytorch")
    assert copied.score(path).score == nut.score(path).score
    earlier = stpm.load(store, "bolt", versions.previous[0].model_id)
    assert earlier.recipe == stpm.load(str(run / "models"), "grey").recipe
    with pytest.raises(DataError, match="category"):
        nut.save(store, "../bolt")
    with pytest.raises(ModelError, match="has models of 3 categories; name one"):
        stpm.load(str(run / "models"))


def test_evaluate_measures_what_scikit_learn_does(nut: Detector, run: Path) -> None:
    folder = run / "data" / "nut" / "test"
    found = nut.evaluate(folder)
    tests = mvtec.read_tests(str(folder))
    results = list(nut.score(test.uri for test in tests))
    is_defect = [test.label != "good" for test in tests]
    assert found.values["image_auroc"] == roc_auc_score(is_defect, [result.score for result in results])
    preprocessing = nut.teacher.preprocessing
    masks = [
        resize_mask(decode_mask(storage.read(test.mask)), preprocessing)
        if test.mask
        else np.zeros(result.model_map.shape, bool)
        for test, result in zip(tests, results, strict=True)
    ]
    expected = roc_auc_score(np.concatenate(masks).ravel(), np.concatenate([r.model_map for r in results]).ravel())
    assert found.values["pixel_auroc"] == pytest.approx(expected, abs=1e-4)
    assert "image AUROC" in repr(found)
    with pytest.raises(DataError, match="give the folder test of a category"):
        nut.evaluate(run / "data" / "nut")


def test_a_defect_without_a_mask_among_others_is_a_problem_of_pixel_metrics(
    nut: Detector, run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run / "data" / "nut", tmp_path / "nut")
    first, *others = sorted((tmp_path / "nut" / "ground_truth").rglob("*.png"))
    first.unlink()
    partly = nut.evaluate(tmp_path / "nut" / "test")
    assert partly.problems == (partly.undefined["pixel_auroc"],)
    assert re.search(rf"^1 of {len(others) + 1} defects have no mask, .*; add or remove masks$", partly.problems[0])
    assert partly.values["image_auroc"] is not None


def test_plain_values_make_a_recipe() -> None:
    plain = dataclasses.replace(TINY, size=96, levels=[1, 2])  # type: ignore[arg-type]
    assert plain == dataclasses.replace(TINY, size=type(TINY.size)("96x96"), levels=type(TINY.levels)((1, 2)))
    assert Recipe(size=(64, 32)).size.sides == (64, 32)  # type: ignore[arg-type]
    for value in ("wide", 3.5, (1, 2, 3)):
        with pytest.raises(ConfigError, match="--size is"):
            Recipe(size=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["pytorch", "openvino"])
@pytest.mark.parametrize(
    ("teacher", "student", "size"),
    [
        ("test_vit", "stpm", "224x288 and 128x160"),
        ("test_convnext", "stpm", "224x288 and 128x160"),
        # Its patches have 14 pixels, and its position embeddings fit 518 x 518 until they are interpolated.
        ("vit_small_patch14_dinov2", "none", "224x280 and 126x154"),
        ("vit_tiny_patch16_dinov3_qkvb", "none", "224x288 and 128x160"),
    ],
)
def test_transformers_and_convnext_are_teachers(
    tmp_path: Path, rng: np.random.Generator, teacher: str, student: StudentKind, size: str, backend: Backend
) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed: its backend was not tried")
    good = list(rng.integers(90, 130, (8, 120, 150, 3), dtype=np.uint8))
    odd = good[0].copy()
    odd[40:80, 40:80] = 250
    recipe = dataclasses.replace(
        PRESETS["default"],
        teacher=teacher,
        teacher_weights="random",
        normalisation="imagenet",
        student=student,
        levels=Integers((1, 2)),
        coarse_pixels=20_000,
        memory=50,
        epochs=2,
        min_steps=0,
    )
    detector = stpm.fit(good, recipe, backend=backend, progress=False)
    assert detector.teacher.preprocessing.size_text == size
    assert detector.teacher.backend == backend
    fine, anomalous = detector.score([good[0], odd])
    assert anomalous.score > fine.score + 2
    assert anomalous.is_anomalous
    detector.save(tmp_path, "nut")
    again = stpm.load(tmp_path, backend=backend).score(odd)
    assert (again.score, again.fine_score, again.coarse_score) == (
        anomalous.score,
        anomalous.fine_score,
        anomalous.coarse_score,
    )


def test_what_cannot_be_fitted_is_refused_in_one_line(tmp_path: Path) -> None:
    make_category(str(tmp_path), "nut")
    good = sorted((tmp_path / "nut" / "train" / "good").iterdir())
    for given, message in (
        (tmp_path / "nut", r"has folders train or test; give the folder of its good images, .*/nut/train/good$"),
        (tmp_path / "nowhere", "no such folder"),
        (good[:1], "good images: 1; this recipe needs at least 2"),
        ([*good, tmp_path / "gone.png"], "gone.png: no such file"),
    ):
        with pytest.raises(DataError, match=message):
            stpm.fit(given, TINY, progress=False)
    with pytest.raises(stpm.ImageError, match="float64 has no fixed range"):
        stpm.fit([np.zeros((8, 8))] * 4, TINY, progress=False)
