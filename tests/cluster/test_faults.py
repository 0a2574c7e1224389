"""Processes killed for real, at random moments; how often, `STPM_TEST_KILLS` says."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import TINY_RECIPE, environment, run_job, start_job
from tests.conftest import REPOSITORY
from tests.datasets import fitted_categories, make_category

pytestmark = pytest.mark.cluster

KILLS = range(int(os.environ.get("STPM_TEST_KILLS", "1")))
CATEGORIES = ("a", "b", "c")
MEMORY = ["--memory", "50", "--fusion", "quantile"]
LONG = ["--epochs", "60", "--workers", "2", "--checkpoint-seconds", "0", *TINY_RECIPE, *MEMORY]
FILES = ("student.safetensors", "memory.safetensors", "calibration.parquet")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("data")
    for name in CATEGORIES:
        make_category(str(root), name, train=12)
    return str(root)


@pytest.fixture(scope="module")
def undisturbed(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    store = tmp_path_factory.mktemp("undisturbed")
    assert run_job("fit", "--data", data, "--models", str(store), *LONG).returncode == 0
    return models(store)


def models(store: Path) -> dict[str, bytes]:
    """All files that scores depend on."""
    assert fitted_categories(str(store)) == list(CATEGORIES)
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.name in FILES}


def started(data: str, store: Path) -> subprocess.Popen[str]:
    """A fit that is in the middle of its work: some random time after its first epoch."""
    process = start_job("fit", "--data", data, "--models", str(store), *LONG)
    assert process.stdout
    for line in process.stdout:
        print(line, end="")
        if "epoch" in line:
            break
    time.sleep(random.uniform(0, 4))
    return process


def training_workers(driver: int) -> list[int]:
    children = psutil.Process(driver).children(recursive=True)
    return [child.pid for child in children if "TrainWorker" in " ".join(child.cmdline())]


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_worker_costs_time_and_not_one_bit(
    kill: int, data: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    process = started(data, tmp_path)
    workers = training_workers(process.pid)
    if workers:
        os.kill(random.choice(workers), signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    print(out, err)
    assert process.returncode == 0
    assert "3 of 3 categories have a model" in out
    assert models(tmp_path) == undisturbed


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_driver_is_taken_up_by_the_next_run(
    kill: int, data: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    process = started(data, tmp_path)
    others = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=60)
    # Ray's own processes end when they notice; a machine that failed would have taken them along.
    for other in others:
        if other.is_running():
            other.kill()
    again = run_job("fit", "--data", data, "--models", str(tmp_path), *LONG)
    assert again.returncode == 0
    assert models(tmp_path) == undisturbed
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.rglob("checkpoint*"))


def test_a_category_that_kills_its_worker_twice_is_set_aside(tmp_path: Path) -> None:
    for name in ("a", "b", "deadly"):
        make_category(str(tmp_path / "data"), name, train=12 if name == "deadly" else 8)
    models = tmp_path / "models"
    process = subprocess.run(
        [sys.executable, "-m", "tests.cluster.deadly", str(tmp_path / "data"), str(models)],
        env=environment(PYTHONPATH=str(REPOSITORY)),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    print(process.stdout, process.stderr)
    assert process.returncode == 0
    assert "outcome a fitted" in process.stdout
    assert "outcome b fitted" in process.stdout
    assert "outcome deadly failed its worker process died 2 times" in process.stdout
    assert fitted_categories(str(models)) == ["a", "b"]
