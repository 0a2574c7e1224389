"""What happens before any worker starts; the test takes the place of the worker group."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from stpm.data import mvtec
from stpm.fitting.fit_categories import fit_categories, warn_about_few_good_images
from stpm.fitting.options import WorkerOptions
from stpm.method.recipe import Recipe
from tests.conftest import MODELS
from tests.datasets import make_category


def categories(root: Path, **images: int) -> list[mvtec.Category]:
    for name, count in images.items():
        make_category(str(root / "data"), name, train=count, good=0, defects=0)
    return [mvtec.read_category(str(root / "data"), name) for name in images]


@pytest.mark.parametrize(("kind", "folds", "minimum"), [("student", 0, 2), ("memory", 0, 3), ("student", 5, 4)])
def test_category_with_too_few_images_fails_before_fitting(
    tmp_path: Path, fitted_keys: list[str], kind: str, folds: int, minimum: int, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = dataclasses.replace(MODELS[kind], calibration_folds=folds)
    data = categories(tmp_path, enough=minimum, few=minimum - 1)
    results = fit_categories(data, recipe, {0: str(tmp_path / "models")}, WorkerOptions(), "auto", False)
    assert fitted_keys == ["enough (seed 0)"]
    assert {result.task.category: bool(result.record) for result in results} == {"few": False, "enough": True}
    message = caplog.messages[0]
    assert f"few (seed 0): failed: good images: {minimum - 1}; this recipe needs at least {minimum}" in message


def test_damaged_model_is_reported_and_fitted_again(
    tmp_path: Path, fitted_keys: list[str], tiny: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    data, store = categories(tmp_path, nut=8, bolt=8), str(tmp_path / "models")
    for _ in range(2):
        fit_categories(data, tiny, {0: store}, WorkerOptions(), "auto", False)
    assert len(fitted_keys) == 2
    (student,) = (tmp_path / "models" / "nut").rglob("student.safetensors")
    student.write_bytes(student.read_bytes()[:-1])
    caplog.clear()
    results = fit_categories(data, tiny, {0: store}, WorkerOptions(), "auto", False)
    assert fitted_keys[2:] == ["nut (seed 0)"]
    assert all(result.record for result in results)
    assert caplog.messages[0].startswith("nut (seed 0): fitted again: ")
    assert "student.safetensors: its SHA-256 is" in caplog.messages[0]
    fit_categories(data, tiny, {0: store}, WorkerOptions(), "auto", False)
    assert len(fitted_keys) == 3


def test_few_good_images_for_a_rate_are_warned_about(
    tmp_path: Path, tiny: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    data = categories(tmp_path, nut=8)
    warn_about_few_good_images(data, tiny, 0.01)
    warn_about_few_good_images(data, dataclasses.replace(tiny, calibration_folds=2), 0.1)
    assert "nut calibrates on 2 of its 8 good images, which supports a rate of 0.333" in caplog.messages[0]
    assert "nut calibrates on 8 of its 8 good images, which supports a rate of 0.111" in caplog.messages[1]
    warn_about_few_good_images(data, dataclasses.replace(tiny, calibration_folds=2), 0.2)
    assert len(caplog.messages) == 2
