"""One task from images to stored model, also after interruptions."""

import dataclasses
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from stpm import storage
from stpm.data import mvtec
from stpm.fitting import fit_detector
from stpm.fitting import train_student as training
from stpm.fitting.fit_categories import existing_model
from stpm.fitting.fit_category import WorkerSettings, fit_category
from stpm.fitting.task import Epoch, FitTask
from stpm.fitting.training_images import load_images, preprocessing_for
from stpm.method.recipe import Recipe
from stpm.method.teacher_weights import load_teacher_weights
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.options import Size
from tests.conftest import MODELS, SETTINGS, Killed
from tests.datasets import make_category

EVERY_EPOCH = dataclasses.replace(SETTINGS, checkpoint_seconds=0.0)


def task_in(root: str | Path, recipe: Recipe, store: str = "models", **changes: Any) -> FitTask:
    make_category(f"{root}/data", "nut", **changes)
    uri = f"{root}/{store}"
    digest = ModelStore(uri).put_teacher(load_teacher_weights(recipe.teacher, recipe.teacher_weights, recipe.levels))
    return FitTask("nut", mvtec.read_category(f"{root}/data", "nut").train, recipe, uri, digest)


def fit(task: FitTask, settings: WorkerSettings = SETTINGS, reported: list[Epoch | str] | None = None) -> ModelRecord:
    """Fit and publish the task's model; `reported` gets the events."""
    result = fit_category(task, settings, ([] if reported is None else reported).append)
    assert result.record, result.reason
    return result.record


def stored_model(task: FitTask) -> ModelRecord | None:
    """Return the category's current model if it is the task's."""
    store = ModelStore(task.store)
    return existing_model(task, (store.current("nut"),)) if store.model_ids("nut") else None


def contents(task: FitTask) -> dict[str, bytes]:
    """Read the files that scores depend on; return their bytes by name."""
    store = ModelStore(task.store)
    folder = f"{store.folder(task.category)}/{store.current(task.category).model_id}"
    return {
        name: storage.read(f"{folder}/{name}")
        for name in ("student.safetensors", "memory.safetensors", "calibration.parquet")
        if storage.exists(f"{folder}/{name}")
    }


def checkpoints(task: FitTask) -> list[str]:
    return [uri for uri in storage.files(f"{task.store}/nut") if "checkpoint" in uri]


def fit_until(task: FitTask, number: int) -> None:
    """Fit, and die when this epoch is reported."""

    def die(message: Epoch | str) -> None:
        if isinstance(message, Epoch) and message.number == number:
            raise Killed

    with pytest.raises(Killed):
        fit_category(task, EVERY_EPOCH, die)
    assert stored_model(task) is None


@pytest.mark.parametrize(
    ("kind", "folds", "dies"),
    [
        ("student", 0, "in epoch 3"),
        ("student and memory", 0, "in epoch 3"),
        ("two views", 0, "in epoch 3"),
        ("memory", 2, "calibrating"),
        ("two views", 2, "calibrating"),
    ],
)
def test_interrupted_task_continues_to_the_same_bits(
    root: str, kind: str, folds: int, dies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(MODELS[kind], epochs=4, calibration_folds=folds)
    undisturbed, task = task_in(root, recipe, "one"), task_in(root, recipe, "two")
    expected = fit(undisturbed)
    if dies == "calibrating":
        with monkeypatch.context() as patch:
            patch.setattr(fit_detector, "calibrate", Mock(side_effect=Killed))
            with pytest.raises(Killed):
                fit_category(task, EVERY_EPOCH, lambda message: None)
        assert len(checkpoints(task)) == (recipe.student == "stpm")
    else:
        fit_until(task, 3)
    reported: list[Epoch | str] = []
    # The id is a digest of everything that scores, thresholds and heatmaps depend on.
    assert fit(task, EVERY_EPOCH, reported).model_id == expected.model_id
    epochs = [epoch.number for epoch in reported if isinstance(epoch, Epoch)]
    assert epochs == ([] if dies == "calibrating" else [3, 4])
    assert contents(task) == contents(undisturbed)
    assert len(contents(task)) == 1 + (recipe.student == "stpm") + bool(recipe.memory)
    assert not checkpoints(task)
    assert stored_model(task)


@pytest.mark.parametrize("damage", ["half", "other recipe"])
def test_damaged_or_foreign_checkpoint_is_ignored(root: str, tiny: Recipe, damage: str) -> None:
    task = task_in(root, dataclasses.replace(tiny, epochs=3))
    fit_until(task, 2)
    (checkpoint,) = checkpoints(task)
    if damage == "half":
        data = storage.read(checkpoint)
        storage.publish(checkpoint, data[: len(data) // 2])
    else:
        task = dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, learning_rate=0.1))
    reported: list[Epoch | str] = []
    fit(task, EVERY_EPOCH, reported)
    assert [epoch.number for epoch in reported if isinstance(epoch, Epoch)] == [1, 2, 3]


def test_model_is_reused_only_for_its_recipe_teacher_and_images(tmp_path: Path) -> None:
    recipe = dataclasses.replace(MODELS["student and memory"], size=Size("auto"), pixels=96 * 64)
    task = task_in(tmp_path, recipe)
    # The size that was chosen is none of the recipe.
    record = fit(task)
    assert (record.preprocessing.size_text, record.recipe) == ("96x64", recipe)
    assert stored_model(task) == record
    for changes in (
        {"recipe": dataclasses.replace(recipe, epochs=9)},
        {"recipe": dataclasses.replace(recipe, smoothing=2.0)},
        {"recipe": dataclasses.replace(recipe, pixels=10_000)},
        {"teacher_digest": "other"},
        {"train": task.train[1:]},
    ):
        assert stored_model(dataclasses.replace(task, **changes)) is None


def test_image_replaced_by_one_of_the_same_name_and_size_is_noticed(root: str, tiny: Recipe) -> None:
    task = task_in(root, tiny)
    before = fit(task)
    uri = task.train[3][0]
    data = storage.read(uri)
    storage.publish(uri, data[:-1] + b"x")

    def now() -> FitTask:
        return dataclasses.replace(task, train=mvtec.read_category(f"{root}/data", "nut").train)

    assert stored_model(now()) is None
    # A fit on the same bytes again gives the same model, which is then reused.
    storage.publish(uri, data)
    assert stored_model(now()) is None
    assert fit(now()) == before == stored_model(now())


def test_gpu_out_of_memory_fails_without_halving_the_batch(
    tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    def full(student: Any, features: Any, chosen: np.ndarray) -> Any:
        steps.append(len(chosen))
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    task = task_in(tmp_path, tiny)
    monkeypatch.setattr(training, "_loss", full)
    reason = fit_category(task, SETTINGS, lambda message: None).reason
    assert re.match(r"CUDA out of memory: .* batches of 4 at this size; lower --batch-size or --pixels", reason)
    assert steps == [4]


def test_stored_model_matches_its_recipe(tmp_path: Path, any_model: Recipe) -> None:
    task, reported = task_in(tmp_path, any_model), []
    record = fit(task, reported=reported)
    model, outcome = ModelStore(task.store).load("nut"), record.fit
    assert (outcome.train_count, outcome.held_out_count, outcome.calibration_count) == (6, 2, 2)
    epochs = [each for each in reported if isinstance(each, Epoch)]
    if any_model.student == "none":
        assert (outcome.epochs, outcome.kept_epoch, outcome.train_loss, outcome.validation_loss) == (0, 0, None, None)
        assert (model.student, epochs) == (None, [])
    else:
        assert (outcome.epochs, len(epochs)) == (2, 2)
        assert outcome.validation_loss == epochs[outcome.kept_epoch - 1].validation_loss
    views = 2 if any_model.coarse_pixels else 1
    banks = 4 * views if any_model.memory else 0
    assert len(model.memory) == banks
    maps = banks + (3 if model.student else 0) + (views if views > 1 else 0)
    assert len(record.distance_scales) == (maps if any_model.fusion == "quantile" else 0)
    messages = [each for each in reported if isinstance(each, str)]
    assert any(f"memory of {50 * banks} vectors in {banks} banks" in each for each in messages) == bool(banks)
    # With folds every image calibrates.
    if any_model.memory:
        folded = dataclasses.replace(task, recipe=dataclasses.replace(any_model, calibration_folds=2))
        assert fit(folded).fit.calibration_count == len(ModelStore(task.store).load("nut").calibration.scores) == 8
    assert not checkpoints(task)


def test_images_over_the_budget_go_to_a_file(tmp_path: Path, tiny: Recipe) -> None:
    task = task_in(tmp_path, tiny)
    uris = [uri for uri, _ in task.train]
    in_memory, on_disk = (load_images(uris, preprocessing_for(tiny, uris), budget) for budget in (2**30, 0))
    assert (in_memory.on_disk, on_disk.on_disk) == (False, True)
    np.testing.assert_array_equal(in_memory.pixels, on_disk.pixels)
    np.testing.assert_array_equal(in_memory.content.boxes, on_disk.content.boxes)
    reported: list[Epoch | str] = []
    fit(task, dataclasses.replace(SETTINGS, ram=0, gpu_ram=0), reported)
    assert isinstance(reported[0], str)
    assert "in a file; teacher's features recomputed" in reported[0]
