"""A driver with one task that ends its worker process every time. test_faults runs it."""

from __future__ import annotations

import os
import sys

from stpm.cluster.connection import connected
from stpm.data import mvtec
from stpm.fitting.options import WorkerOptions
from stpm.fitting.progress import FitProgress
from stpm.fitting.task import FitTask
from stpm.fitting.worker_group import run_worker_group
from stpm.fitting.worker_resources import WorkerResources
from stpm.method.arithmetic import Arithmetic
from stpm.method.teacher_weights import load_teacher_weights
from stpm.models.store import ModelStore
from tests.conftest import TINY


class CrashingTask(FitTask):
    @property
    def data_fingerprint(self) -> str:  # type: ignore[override]
        os._exit(1)


def main(data: str, models: str) -> None:
    digest = ModelStore(models).put_teacher(load_teacher_weights(TINY.teacher, TINY.teacher_weights, TINY.levels))
    tasks = [
        (CrashingTask if name == "crashing" else FitTask)(
            name, mvtec.read_category(data, name).train, TINY, models, digest
        )
        for name in mvtec.find_categories(data)
    ]
    with connected():
        results = run_worker_group(
            tasks,
            WorkerOptions(workers=2),
            WorkerResources(cpus=1),
            Arithmetic(),
            f"{models}/.train",
            FitProgress(tasks, None),
        )
    for result in results:
        print(f"outcome {result.task.category} {'fitted' if result.record else 'failed'} {result.reason}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
