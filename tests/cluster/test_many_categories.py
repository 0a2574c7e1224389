"""Many categories that take a second or less each."""

import time
from pathlib import Path

import psutil
import pytest

from stpm.models.store import ModelStore
from tests.cluster.conftest import TINY_RECIPE, start_job
from tests.datasets import fitted_categories, make_category

pytestmark = pytest.mark.cluster

COUNT = 40


def test_the_drivers_memory_stays_constant_and_workers_do_not_wait_for_it(tmp_path: Path) -> None:
    for i in range(COUNT):
        make_category(f"{tmp_path}/data", f"part-{i:03}", train=6, good=0, defects=0, seed=i)
    data, models = str(tmp_path / "data"), str(tmp_path / "models")
    process = start_job("fit", "--data", data, "--models", models, "--epochs", "3", *TINY_RECIPE)
    assert process.stdout
    memory = []
    first = 0.0
    for line in process.stdout:
        # On a slow machine another line says that nothing has ended yet.
        if " ended" in line and "at work" not in line:
            first = first or time.monotonic()
            memory.append(psutil.Process(process.pid).memory_info().rss)
    process.communicate(timeout=60)
    seconds = time.monotonic() - first
    assert process.returncode == 0
    store = ModelStore(models)
    names = fitted_categories(models)
    assert len(names) == COUNT == len(memory)
    work = sum(store.record(name).fit.seconds for name in names)
    print(f"{seconds:.0f} s from the first end to the last, {work:.0f} s of work")
    print(f"driver {memory[0] / 2**20:.0f} MiB at the first, {memory[-1] / 2**20:.0f} MiB at the last")
    assert memory[-1] < 1.1 * memory[COUNT // 4]
    # With two workers, half of the work's seconds is the minimum.
    assert seconds < 3 * work / 2
