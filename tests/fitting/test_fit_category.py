"""One task with its input and output: what is stored, and what survives an interruption."""

from __future__ import annotations

import dataclasses
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stpm import storage
from stpm.data import mvtec
from stpm.errors import DataError, ModelError, StpmError
from stpm.fitting import train_student as loop
from stpm.fitting.fit_category import Limits, existing_model, run_task
from stpm.fitting.task import Epoch, FitTask
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.training_images import load_images, preprocessing_for
from stpm.method.backbones import load_teacher_weights
from stpm.method.preprocessing import Preprocessing
from stpm.method.recipe import Recipe
from stpm.models.store import ModelStore
from stpm.options import Size
from tests.conftest import LIMITS, MODELS, preprocessing_of
from tests.datasets import encoded, make_category

EVERY_EPOCH = dataclasses.replace(LIMITS, checkpoint_seconds=0.0)


def task_in(root: str, recipe: Recipe, store: str = "models", **changes: Any) -> FitTask:
    make_category(f"{root}/data", "nut", **changes)
    uri = f"{root}/{store}"
    digest = ModelStore(uri).put_teacher(load_teacher_weights(recipe.teacher, recipe.teacher_weights, recipe.levels))
    return FitTask.of(mvtec.read_category(f"{root}/data", "nut"), recipe, uri, digest)


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    return str(tmp_path) if request.param == "local" else memory


def folder_of(task: FitTask) -> str:
    """The folder of the category's model."""
    store = ModelStore(task.store)
    return f"{store.folder(task.category)}/{store.current(task.category).model_id}"


def contents(task: FitTask) -> dict[str, bytes]:
    """Of the files that scores depend on, by name."""
    folder = folder_of(task)
    return {
        name: storage.read(f"{folder}/{name}")
        for name in ("student.safetensors", "memory.safetensors", "calibration.parquet")
        if storage.exists(f"{folder}/{name}")
    }


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", ["student", "student and memory"])
def test_an_interrupted_task_goes_on_and_stores_the_same_bits(root: str, kind: str) -> None:
    recipe = dataclasses.replace(MODELS[kind], epochs=4)
    undisturbed, task = task_in(root, recipe, "one"), task_in(root, recipe, "two")
    run_task(undisturbed, LIMITS, lambda told: None)

    def die(told: Epoch | str) -> None:
        if isinstance(told, Epoch) and told.number == 3:
            raise Killed

    with pytest.raises(Killed):
        run_task(task, EVERY_EPOCH, die)
    assert existing_model(task) is None
    seen: list[Epoch | str] = []
    run_task(task, EVERY_EPOCH, seen.append)
    assert [told.number for told in seen if isinstance(told, Epoch)] == [3, 4]
    assert contents(task) == contents(undisturbed)
    assert len(contents(task)) == (3 if recipe.memory else 2)
    assert not storage.exists(ModelStore(task.store).checkpoint_uri("nut"))
    assert existing_model(task)


@pytest.mark.parametrize("damage", ["half", "other recipe"])
def test_progress_that_is_not_this_tasks_is_not_used(
    root: str, tiny: Recipe, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(told: Epoch | str) -> None:
        if isinstance(told, Epoch) and told.number == 2:
            raise Killed

    task = task_in(root, dataclasses.replace(tiny, epochs=3))
    with pytest.raises(Killed):
        run_task(task, EVERY_EPOCH, die)
    checkpoint = ModelStore(task.store).checkpoint_uri("nut")
    if damage == "half":
        data = storage.read(checkpoint)
        storage.publish(checkpoint, data[: len(data) // 2])
    else:
        task = dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, learning_rate=0.1))
    seen: list[Epoch | str] = []
    run_task(task, EVERY_EPOCH, seen.append)
    assert [told.number for told in seen if isinstance(told, Epoch)] == [1, 2, 3]


def test_a_model_is_done_only_for_its_own_recipe_teacher_and_images(root: str, any_model: Recipe) -> None:
    task = task_in(root, any_model)
    run_task(task, LIMITS, lambda told: None)
    assert existing_model(task)
    assert existing_model(dataclasses.replace(task, recipe=dataclasses.replace(any_model, epochs=9))) is None
    assert existing_model(dataclasses.replace(task, recipe=dataclasses.replace(any_model, smoothing=2.0))) is None
    assert existing_model(dataclasses.replace(task, teacher_digest="other")) is None
    assert existing_model(dataclasses.replace(task, train=task.train[1:])) is None


def test_an_image_that_was_shot_again_is_another_though_its_name_and_size_are_the_same(
    root: str, any_model: Recipe
) -> None:
    task = task_in(root, any_model)
    run_task(task, LIMITS, lambda told: None)
    uri = task.train[3][0]
    data = storage.read(uri)
    storage.publish(uri, data[:-1] + b"x")

    def now() -> FitTask:
        category = mvtec.read_category(f"{root}/data", "nut")
        return FitTask.of(category, task.recipe, task.store, task.teacher_digest)

    assert existing_model(now()) is None
    # Fitted again on what is the same to the bit, it is the same model, and known as that.
    storage.publish(uri, data)
    assert existing_model(now()) is None
    before = ModelStore(task.store).record("nut")
    assert run_task(now(), LIMITS, lambda told: None).record == before == existing_model(now())


def test_a_damaged_model_is_no_model_that_is_there(root: str) -> None:
    task = task_in(root, MODELS["student and memory"])
    record = run_task(task, LIMITS, lambda told: None).record
    assert record
    for file in record.files:
        uri = f"{task.store}/nut/{record.model_id}/{file}"
        data = storage.read(uri)
        storage.publish(uri, data + b" ")
        with pytest.raises(ModelError, match=f"{file}: its SHA-256"):
            existing_model(task)
        storage.remove(uri)
        with pytest.raises(ModelError, match=f"{file}: cannot be read"):
            existing_model(task)
        storage.publish(uri, data)
    storage.remove(uri)
    assert run_task(task, LIMITS, lambda told: None).record
    assert existing_model(task) == ModelStore(task.store).load("nut").record


def test_a_damaged_teacher_is_put_there_again(root: str, tiny: Recipe) -> None:
    task = task_in(root, tiny)
    uri = f"{task.store}/teachers/{task.teacher_digest}.safetensors"
    whole = storage.read(uri)
    storage.publish(uri, whole[:100])
    task_in(root, tiny)
    assert storage.read(uri) == whole


def test_a_gpu_that_is_too_small_is_said_and_no_batch_is_halved(
    root: str, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    def full(student: Any, features: Any, chosen: np.ndarray) -> Any:
        steps.append(len(chosen))
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    task = task_in(root, tiny)
    monkeypatch.setattr(loop, "_loss", full)
    with pytest.raises(
        StpmError, match=r"^CUDA out of memory: .* batches of 4 at this size; lower --batch-size or --pixels"
    ):
        run_task(task, LIMITS, lambda told: None)
    assert steps == [4]


def test_distances_have_what_images_and_features_leave(root: str, tiny: Recipe, matcher_of: Any) -> None:
    uris = [uri for uri, _ in task_in(root, tiny).train]
    images = load_images(uris, preprocessing_for(tiny, uris), 2**30)
    for budget, taken in ((2**30, 1), (0, 0)):
        features = TeacherFeatures(matcher_of(tiny), images, budget)
        room = Limits(2**30, 0, 0).room_for_distances(features)
        assert room == 2**30 - images.pixels.nbytes - taken * features.size


def test_folds_calibrate_on_every_image(root: str, any_model: Recipe) -> None:
    task = task_in(root, dataclasses.replace(any_model, calibration_folds=2))
    record = run_task(task, LIMITS, lambda told: None).record
    assert record
    assert record.fit.calibration_count == 8
    assert len(ModelStore(task.store).load("nut").calibration.scores) == 8
    assert not [uri for uri, _ in storage.files(f"{task.store}/nut") if "checkpoint" in uri]


def test_what_a_task_stores_is_what_its_recipe_says(root: str, any_model: Recipe) -> None:
    task, told = task_in(root, any_model), []
    outcome = run_task(task, LIMITS, told.append)
    record = outcome.record
    assert record
    fit, model = record.fit, ModelStore(task.store).load("nut")
    assert (fit.train_count, fit.validation_count, fit.calibration_count) == (6, 2, 2)
    epochs = [each for each in told if isinstance(each, Epoch)]
    if any_model.student == "none":
        assert (fit.epochs, fit.kept_epoch, fit.train_loss, fit.validation_loss, epochs) == (0, 0, None, None, [])
        assert model.parts.student is None
    else:
        assert (fit.epochs, len(epochs)) == (2, 2)
        assert fit.validation_loss == epochs[fit.kept_epoch - 1].validation_loss
    banks = 4 if any_model.memory else 0
    assert len(model.parts.memory) == banks
    assert len(record.part_scales) == banks + (3 if model.parts.student else 0)
    assert any("memory of 200 vectors in 4 banks" in each for each in told if isinstance(each, str)) == bool(banks)


def test_a_second_fit_stores_the_same_bits(root: str, any_model: Recipe) -> None:
    recipe = dataclasses.replace(any_model, calibration_folds=2)
    tasks = [task_in(root, recipe, store) for store in ("one", "two")]
    records = [run_task(task, LIMITS, lambda told: None).record for task in tasks]
    assert contents(tasks[0]) == contents(tasks[1])
    assert records[0]
    assert records[1]
    assert records[0].model_id == records[1].model_id
    assert records[0].part_scales == records[1].part_scales
    assert records[0].heatmap_scale == records[1].heatmap_scale


@pytest.mark.parametrize("kind", ["student", "student and memory"])
@pytest.mark.parametrize("dies_in_fold", [1, 2])
def test_an_interrupted_calibration_goes_on_with_the_fold_it_was_in(
    root: str, kind: str, dies_in_fold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(MODELS[kind], epochs=3, calibration_folds=2)
    undisturbed, task = task_in(root, recipe, "one"), task_in(root, recipe, "two")
    run_task(undisturbed, LIMITS, lambda told: None)
    trained: list[int] = []
    original = loop._train

    def count(*arguments: Any) -> float:
        trained.append(arguments[-1])
        if dying and trained == [1, 2, 3] * dies_in_fold + [1, 2]:
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(loop, "_train", count)
    dying = True
    with pytest.raises(Killed):
        run_task(task, EVERY_EPOCH, lambda told: None)
    dying = False
    trained.clear()
    run_task(task, EVERY_EPOCH, lambda told: None)
    assert trained == [2, 3] + [1, 2, 3] * (2 - dies_in_fold)
    assert contents(task) == contents(undisturbed)
    assert not [uri for uri, _ in storage.files(f"{task.store}/nut") if "checkpoint" in uri]


def test_images_beyond_the_budget_go_to_a_file_and_nothing_else_changes(root: str, tiny: Recipe) -> None:
    task = task_in(root, tiny)
    uris = [uri for uri, _ in task.train]
    in_memory, on_disk = (load_images(uris, preprocessing_for(tiny, uris), budget) for budget in (2**30, 0))
    assert on_disk.on_disk
    assert not in_memory.on_disk
    np.testing.assert_array_equal(in_memory.pixels, on_disk.pixels)
    np.testing.assert_array_equal(in_memory.content, on_disk.content)
    told: list[Epoch | str] = []
    run_task(task, Limits(0, 0, 1e9), told.append)
    assert isinstance(told[0], str)
    assert "in a file; teacher's features computed anew" in told[0]


def test_a_disk_without_room_for_them_is_said(root: str, tiny: Recipe) -> None:
    uris = [uri for uri, _ in task_in(root, tiny).train]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(DataError, match=r"no room for .* GiB of decoded images in .*--memory-gib"):
            load_images(uris, preprocessing_for(tiny, uris), budget=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_broken_files_are_all_named(tmp_path: Path) -> None:
    make_category(str(tmp_path), "nut", train=9)
    folder = tmp_path / "nut" / "train" / "good"
    for i in range(7):
        (folder / f"{i:03}.png").write_bytes(b"")
    uris = [str(path) for path in sorted(folder.iterdir())]
    with pytest.raises(DataError, match=r"7 of 9 training images cannot be read: .*000.png.*; and 2 more; repair"):
        load_images(uris, preprocessing_of(64), 2**30)


def test_a_loss_curve_is_a_picture(root: str, tiny: Recipe) -> None:
    task = task_in(root, tiny)
    run_task(task, LIMITS, lambda told: None)
    assert storage.read(f"{folder_of(task)}/loss.png").startswith(b"\x89PNG")


def test_a_size_that_is_auto_is_that_of_the_images(root: str, tiny: Recipe) -> None:
    recipe = dataclasses.replace(tiny, size=Size("auto"), pixels=96 * 64, resize="fit")
    task = task_in(root, recipe, shape=(150, 100))
    record = run_task(task, LIMITS, lambda told: None).record
    assert record
    assert record.preprocessing == Preprocessing(96, 64, "fit", "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert record.recipe == recipe
    assert existing_model(task) == ModelStore(task.store).record("nut")
    assert existing_model(dataclasses.replace(task, recipe=dataclasses.replace(recipe, pixels=10_000))) is None


def test_the_normalisation_is_the_one_asked_for(tiny: Recipe) -> None:
    for name, mean, std in (
        ("teacher", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("none", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ):
        made = preprocessing_for(dataclasses.replace(tiny, normalisation=name), [])  # type: ignore[arg-type]
        assert (made.mean, made.std) == (mean, std)
    assert preprocessing_for(dataclasses.replace(tiny, teacher="demo"), []).interpolation == "bicubic"


def test_few_headers_are_read_for_a_size_and_broken_ones_left_to_loading(
    tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_category(str(tmp_path), "nut", train=100, shape=(64, 96))
    uris = [str(path) for path in sorted((tmp_path / "nut" / "train" / "good").iterdir())]
    Path(uris[0]).write_bytes(b"")
    read: list[str] = []
    original = storage.read_at_most
    monkeypatch.setattr(storage, "read_at_most", lambda uri, most: read.append(uri) or original(uri, most))
    recipe = dataclasses.replace(tiny, size=Size("auto"), pixels=64 * 96)
    assert preprocessing_for(recipe, uris).size == "64x96"
    assert len(read) == len(set(read)) == 32
    assert {uris[0], uris[-1]} <= set(read)
    for uri in uris:
        Path(uri).write_bytes(b"")
    with pytest.raises(DataError, match=r"32 of 32 training images cannot be read: .*000.png.*; and 27 more; repair"):
        preprocessing_for(recipe, uris)


def test_images_of_mixed_proportions_are_fitted_without_their_padding(root: str, any_model: Recipe) -> None:
    recipe = dataclasses.replace(any_model, resize="fit", validation_fraction=0.4)
    task = task_in(root, recipe)
    for i, (height, width) in enumerate(((20, 60), (60, 20), (1, 50), (50, 1))):
        pixels = np.random.default_rng(i).integers(90, 130, (height, width, 3), dtype=np.uint8)
        storage.publish(task.train[i][0], encoded(pixels))
    record = run_task(task, LIMITS, lambda told: None).record
    assert record
    for loss in (record.fit.train_loss, record.fit.validation_loss):
        assert 0 < loss < 2 if recipe.student != "none" else loss is None
    assert np.isfinite(ModelStore(task.store).load("nut").calibration.scores).all()
