"""A driver with one task that ends its worker process every time. test_faults runs it."""

from __future__ import annotations

import os
import sys

from stpm.cluster.connection import connected
from stpm.data import mvtec
from stpm.fitting.options import PoolOptions
from stpm.fitting.progress import FitProgress
from stpm.fitting.task import FitTask
from stpm.fitting.worker_group import run_pool
from stpm.method.backbones import load_teacher
from stpm.models.store import ModelStore
from tests.conftest import TINY


class CrashingTask(FitTask):
    @property
    def data_fingerprint(self) -> str:  # type: ignore[override]
        os._exit(1)


def main(data: str, models: str) -> None:
    digest = ModelStore(models).put_teacher(load_teacher(TINY.teacher, TINY.teacher_weights, TINY.levels))
    tasks = [
        (CrashingTask if name == "crashing" else FitTask).of(mvtec.read_category(data, name), TINY, models, digest)
        for name in mvtec.find_categories(data)
    ]
    with connected():
        outcomes = run_pool(
            tasks, PoolOptions(workers=2, cpus_per_worker=1), f"{models}/.train", FitProgress(tasks, None)
        )
    for outcome in outcomes:
        print(f"outcome {outcome.category} {outcome.status} {outcome.reason}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
