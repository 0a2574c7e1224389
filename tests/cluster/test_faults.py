"""Worker processes killed for real."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from stpm.models import ModelStore
from tests.cluster.conftest import TINY_RECIPE, start_job
from tests.datasets import make_category

pytestmark = pytest.mark.cluster


def training_workers(driver: int) -> list[int]:
    children = psutil.Process(driver).children(recursive=True)
    return [child.pid for child in children if "TrainWorker" in " ".join(child.cmdline())]


def test_a_killed_worker_costs_time_and_nothing_else(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        make_category(str(tmp_path / "data"), name, train=12)
    store = str(tmp_path / "models")
    process = start_job(
        "fit", "--data", str(tmp_path / "data"), "--models", store, "--epochs", "60", "--workers", "2", *TINY_RECIPE
    )
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "epoch" in line:
            break
    workers = training_workers(process.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    killed = time.monotonic()
    out, err = process.communicate(timeout=300)
    print(*lines, out, err, f"ended {time.monotonic() - killed:.0f} s after the kill")
    assert process.returncode == 0
    assert ModelStore(store).categories() == ["a", "b", "c"]
    assert "3 of 3 categories have a model" in out
