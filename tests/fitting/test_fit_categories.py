"""What is decided before any worker starts: the pool's part is played by the test."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from stpm.data import mvtec
from stpm.fitting import fit_categories as run
from stpm.fitting.fit_categories import fit_categories, warn_of_few_normals
from stpm.fitting.fit_category import run_task
from stpm.fitting.task import FitTask, Outcome
from stpm.fitting.worker_group import WorkerOptions
from stpm.method.recipe import Recipe
from tests.conftest import LIMITS, MODELS
from tests.datasets import make_category


@pytest.fixture
def fitted_keys(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of the tasks that a pool was started for."""
    keys: list[str] = []

    def run_pool(tasks: Sequence[FitTask], *_: Any) -> list[Outcome]:
        keys.extend(task.key for task in tasks)
        return [run_task(task, LIMITS, lambda told: None) for task in tasks]

    monkeypatch.setattr(run, "run_pool", run_pool)
    monkeypatch.setattr(run, "connected", nullcontext)
    monkeypatch.setattr(run, "working_nodes", lambda: [{"CPU": 1.0}])
    return keys


def categories(root: Path, **images: int) -> list[mvtec.Category]:
    for name, count in images.items():
        make_category(str(root / "data"), name, train=count, good=0, defects=0)
    return [mvtec.read_category(str(root / "data"), name) for name in images]


@pytest.mark.parametrize(("kind", "folds", "least"), [("student", 0, 2), ("memory", 0, 3), ("student", 5, 4)])
def test_a_category_of_too_few_images_fails_before_anything_is_fitted(
    tmp_path: Path, fitted_keys: list[str], kind: str, folds: int, least: int, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = dataclasses.replace(MODELS[kind], calibration_folds=folds)
    of = categories(tmp_path, enough=least, few=least - 1)
    outcomes = fit_categories(of, recipe, {0: str(tmp_path / "models")}, WorkerOptions(), False)
    assert fitted_keys == ["enough (seed 0)"]
    assert {o.category: o.status for o in outcomes} == {"few": "failed", "enough": "fitted"}
    assert f"few (seed 0): failed: good images: {least - 1}; this recipe needs at least {least}" in caplog.messages[0]


def test_a_damaged_model_is_said_and_fitted_again(
    tmp_path: Path, fitted_keys: list[str], tiny: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    of, store = categories(tmp_path, nut=8, bolt=8), str(tmp_path / "models")
    for _ in range(2):
        fit_categories(of, tiny, {0: store}, WorkerOptions(), False)
    assert len(fitted_keys) == 2
    (student,) = (tmp_path / "models" / "nut").rglob("student.safetensors")
    student.write_bytes(student.read_bytes()[:-1])
    caplog.clear()
    outcomes = fit_categories(of, tiny, {0: store}, WorkerOptions(), False)
    assert fitted_keys[2:] == ["nut (seed 0)"]
    assert {o.category: o.status for o in outcomes} == {"nut": "fitted", "bolt": "reused"}
    assert caplog.messages[0].startswith("nut (seed 0): fitted again: ")
    assert "student.safetensors: its SHA-256 is" in caplog.messages[0]
    fit_categories(of, tiny, {0: store}, WorkerOptions(), False)
    assert len(fitted_keys) == 3


def test_that_normals_are_few_for_a_rate_is_said_of_what_is_to_be_fitted(
    tmp_path: Path, tiny: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    of = categories(tmp_path, nut=8)
    warn_of_few_normals(of, tiny, 0.01)
    warn_of_few_normals(of, dataclasses.replace(tiny, calibration_folds=2), 0.1)
    assert "nut has 2 of its 8 good images and supports 0.333" in caplog.messages[0]
    assert "nut has 8 of its 8 good images and supports 0.111" in caplog.messages[1]
    warn_of_few_normals(of, dataclasses.replace(tiny, calibration_folds=2), 0.2)
    assert len(caplog.messages) == 2
