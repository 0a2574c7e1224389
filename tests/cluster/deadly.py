"""A driver whose pool has one task that kills its worker process, each time. Run by test_faults."""

from __future__ import annotations

import os
import sys

from stpm.cluster.connection import connected
from stpm.data import mvtec
from stpm.fitting.options import PoolOptions
from stpm.fitting.progress import FitProgress
from stpm.fitting.task import FitTask
from stpm.fitting.worker_group import run_pool
from stpm.method.backbones import load_teacher_weights
from stpm.models.store import ModelStore
from tests.conftest import TINY


class DeadlyTask(FitTask):
    @property
    def data_fingerprint(self) -> str:  # type: ignore[override]
        os._exit(1)


def main(data: str, models: str) -> None:
    digest = ModelStore(models).put_teacher(load_teacher_weights(TINY.teacher, TINY.teacher_weights, TINY.levels))
    tasks = [
        (DeadlyTask if name == "deadly" else FitTask).of(mvtec.read_category(data, name), TINY, models, digest)
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
