"""Fits whose processes are killed at random moments, `STPM_TEST_KILLS` times each."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from stpm import storage
from stpm.cluster.device import KEEP_FREED_MEMORY
from stpm.errors import HOW_TO_CONTINUE
from tests.cluster.conftest import (
    FIT_WORKER,
    KILLS,
    TINY_RECIPE,
    children,
    kill_tree,
    run_job,
    start_job,
    wait_for,
    wait_for_success,
)
from tests.conftest import REPOSITORY
from tests.datasets import CRASHING_SITECUSTOMIZE, crashing_image, fitted_categories, make_category

pytestmark = pytest.mark.cluster

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
    """Read all files that scores depend on."""
    assert fitted_categories(str(store)) == list(CATEGORIES)
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.name in FILES}


def start_fit(data: str, store: Path, seconds: float) -> subprocess.Popen[str]:
    """Start a fit, and wait for a random time after its first epoch, at most so many seconds."""
    process = start_job("fit", "--data", data, "--models", str(store), *LONG)
    assert process.stdout
    for line in process.stdout:
        print(line, end="")
        if "epoch" in line:
            break
    time.sleep(random.uniform(0, seconds))
    return process


@pytest.mark.parametrize("kill", KILLS)
def test_a_fit_with_a_killed_worker_gives_the_same_models(
    kill: int, data: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    process = start_fit(data, tmp_path, 4)
    workers = children(process.pid, FIT_WORKER)
    assert workers, "the fit ended before the kill"
    assert KEEP_FREED_MEMORY["env_vars"].items() <= workers[0].environ().items()
    random.choice(workers).kill()
    assert "3 of 3 categories are fitted" in wait_for_success(process)
    assert models(tmp_path) == undisturbed


@pytest.mark.parametrize("kill", KILLS)
def test_a_fit_after_a_killed_driver_gives_the_same_models(
    kill: int, data: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """The fit is stopped by a signal, and started again; killed with all its processes; and then the driver alone."""
    stopped = start_fit(data, tmp_path, 1.3)
    stopped.send_signal(signal.SIGINT)
    ended = wait_for(stopped)
    assert ended.returncode == 128 + signal.SIGINT
    assert ended.stdout.splitlines()[-1] == f"stopped by SIGINT: {HOW_TO_CONTINUE}"
    assert ended.stderr == ""

    kill_tree(start_fit(data, tmp_path, 1.3))
    # Of a driver that is killed alone, the processes that it started go on for a moment.
    orphans = start_fit(data, tmp_path, 1.3)
    orphans.kill()
    again = run_job("fit", "--data", data, "--models", str(tmp_path), *LONG)
    orphans.communicate()
    assert again.returncode == 0
    assert again.stdout.count("is there already") < len(CATEGORIES), "the fit ended before the kill"
    assert models(tmp_path) == undisturbed
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.rglob("checkpoint*"))


def test_a_category_that_crashes_its_worker_twice_fails(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(CRASHING_SITECUSTOMIZE)
    data, models = str(tmp_path / "data"), str(tmp_path / "models")
    for name in ("a", "b", "crashing"):
        make_category(data, name, train=12 if name == "crashing" else 8)
    storage.publish(f"{data}/crashing/train/good/000.png", crashing_image())
    options = ["--data", data, "--models", models, "--workers", "2", "--epochs", "2", *TINY_RECIPE]
    ran = run_job("fit", *options, PYTHONPATH=f"{tmp_path}:{REPOSITORY}")
    assert ran.returncode == 2
    assert "  failed: its worker process died 2 times" in ran.stdout
    assert fitted_categories(models) == ["a", "b"]
