"""Fixtures that all tests share, and a summary of the tests on real data."""

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fsspec
import hypothesis
import numpy as np
import pytest
import torch

from stpm import storage
from stpm.data import mvtec
from stpm.fitting import fit_categories as fitting
from stpm.fitting.fit_category import WorkerSettings, fit_category
from stpm.fitting.task import FitResult, FitTask
from stpm.fitting.training_images import preprocessing_for
from stpm.method.arithmetic import Arithmetic, cpu_capabilities
from stpm.method.backbones import load_backbone
from stpm.method.preprocessing import IMAGENET, Preprocessing, Resize
from stpm.method.recipe import Recipe
from stpm.method.teacher import Teacher
from stpm.method.teacher_weights import load_teacher_weights
from stpm.method.views import choose_views, levels_of_teacher
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.options import Integers, Size

# Processes of tests share the cores, and threads that wait for each other spin. Jobs choose their own number.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# A machine may be slow.
hypothesis.settings.register_profile("stpm", deadline=None)
hypothesis.settings.load_profile("stpm")

# Tests check what jobs log.
logging.getLogger("stpm").setLevel(logging.INFO)

REPOSITORY = Path(__file__).parent.parent
REAL_DATA = REPOSITORY.parent / "shared" / "data" / "mvtec"

# A student of a few thousand weights: fitting it takes a second.
TINY = Recipe(
    teacher="test_resnet",
    teacher_weights="random",
    size=Size("64"),
    epochs=2,
    batch_size=4,
    precision="float32",
    held_out_fraction=0.25,
)


# A recipe for each kind of model, by its parts.
MEMORY = dataclasses.replace(TINY, memory=50, memory_levels=Integers((2, 3)), fusion="quantile")
MODELS = {
    "student": TINY,
    "student and memory": dataclasses.replace(MEMORY, top_fraction=0.01, smoothing=1.0),
    "memory": dataclasses.replace(MEMORY, student="none"),
    "two views": dataclasses.replace(MEMORY, coarse_pixels=1024, coarse_levels=Integers((1, 2))),
}


def make_preprocessing(height: int, width: int = 0, resize: Resize = "stretch") -> Preprocessing:
    """Make a preprocessing with this input height and width (0: a square) and ImageNet's normalisation."""
    return Preprocessing(height, width or height, resize, *IMAGENET[2:], *IMAGENET[:2])


SETTINGS = WorkerSettings(torch.device("cpu"), Arithmetic(), ram=2**30, gpu_ram=2**30, checkpoint_seconds=1e9)


def fit_model(data: object, models: object, category: str = "nut", recipe: Recipe = TINY) -> ModelRecord:
    """Fit a category of a data set in this process, and store its model."""
    found, store = mvtec.read_category(storage.absolute(str(data)), category), ModelStore(str(models))
    digest = store.put_teacher(load_teacher_weights(recipe.teacher, recipe.teacher_weights, recipe.levels))
    task = FitTask(category, found.train, recipe, store.uri, digest, found.roi, found.rois)
    result = fit_category(task, SETTINGS, lambda message: None)
    assert result.record, result.reason
    return result.record


@pytest.fixture
def tiny() -> Recipe:
    return TINY


@pytest.fixture(params=MODELS)
def any_model(request: pytest.FixtureRequest) -> Recipe:
    """Return each recipe of MODELS in turn."""
    return MODELS[request.param]


@pytest.fixture
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip(f"real data: {REAL_DATA} is missing")
    return REAL_DATA


@pytest.fixture
def memory() -> Iterator[str]:
    """Return the root of an empty in-memory filesystem."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield "memory://root"
    fs.store.clear()


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    """Return the URI of an empty folder, on a local disk or in an in-memory filesystem."""
    return str(tmp_path) if request.param == "local" else memory


class Killed(BaseException):
    """Ends a command anywhere, as a kill does."""


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def fail_to_read(patch: pytest.MonkeyPatch, error: OSError, names: Collection[str]) -> None:
    """Let storage fail to read each object whose URI holds one of the names."""
    original = storage.read

    def read(uri: str, start: int | None = None, end: int | None = None) -> bytes:
        if any(name in uri for name in names):
            raise error
        return original(uri, start, end)

    patch.setattr(storage, "read", read)


def record_calls(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """Let a function or method of `owner` go on as it does; return the list of its calls' arguments."""
    original, calls = getattr(owner, name), []

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return original(*arguments, **options)

    patch.setattr(owner, name, call)
    return calls


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def make_teacher() -> Callable[[Recipe], Teacher]:
    """Return a function that makes an untrained teacher on the CPU."""

    def make(recipe: Recipe) -> Teacher:
        state = load_teacher_weights(recipe.teacher, recipe.teacher_weights, levels_of_teacher(recipe))
        backbone = load_backbone(recipe.teacher, levels_of_teacher(recipe), state, "test")
        preprocessing = preprocessing_for(recipe, [])
        views = choose_views(recipe, preprocessing)
        return Teacher(backbone, preprocessing, torch.device("cpu"), "float32", views=views)

    return make


@pytest.fixture
def fitted_keys(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fit in this process instead of in workers; the keys of the tasks that were fitted."""
    keys: list[str] = []

    def run_worker_group(tasks: Sequence[FitTask], *_: Any) -> list[FitResult]:
        keys.extend(task.key for task in tasks)
        return [fit_category(task, SETTINGS, lambda message: None) for task in tasks]

    monkeypatch.setattr("stpm.fitting.worker_group.run_worker_group", run_worker_group)
    monkeypatch.setattr(fitting, "connected", nullcontext)
    monkeypatch.setattr(fitting, "nodes_for_plan", lambda _: [{"CPU": 1.0}])
    monkeypatch.setattr(fitting, "examine_devices", lambda gpus: [cpu_capabilities()])
    return keys


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium is installed: no page was opened in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the tests on real data, so that CI shows that they ran."""
    reports = [
        (outcome, report)
        for outcome in ("passed", "failed", "skipped")
        for report in terminalreporter.getreports(outcome)
        if "real_data" in getattr(report, "keywords", {}) and (report.when == "call" or outcome == "skipped")
    ]
    if reports:
        terminalreporter.section("tests on real data")
        for outcome, report in reports:
            terminalreporter.write_line(f"{outcome.upper()} {report.nodeid}")
