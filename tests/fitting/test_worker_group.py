from __future__ import annotations

from collections.abc import Callable

import pytest
import ray.train

from stpm.errors import ConfigError
from stpm.fitting.options import WorkerOptions
from stpm.fitting.worker_group import Resources, again_while_nodes_are_lost, planned, scaling, shared_out

ONE, BIG = WorkerOptions(cpus_per_worker=1), {"CPU": 8.0}


@pytest.mark.parametrize(
    ("options", "nodes", "tasks", "workers", "use_gpu"),
    [
        (ONE, [BIG], 100, 8, False),
        (ONE, [BIG], 3, 3, False),
        (WorkerOptions(cpus_per_worker=4), [BIG], 100, 2, False),
        # A worker is never split: three cores and three are two workers of two.
        (WorkerOptions(cpus_per_worker=2), [{"CPU": 3.0}, {"CPU": 3.0}], 100, 2, False),
        (ONE, [{"CPU": 8.0, "GPU": 2.0}], 100, 2, True),
        (WorkerOptions(cpus_per_worker=1, gpus_per_worker=0.25), [{"CPU": 64.0, "GPU": 2.0}], 100, 8, True),
        (WorkerOptions(cpus_per_worker=1, gpus_per_worker=0.25), [{"CPU": 3.0, "GPU": 2.0}], 100, 3, True),
        (WorkerOptions(cpus_per_worker=1, gpus_per_worker=0.1), [{"CPU": 64.0, "GPU": 1.0}], 100, 10, True),
        (WorkerOptions(cpus_per_worker=1, gpus_per_worker=0), [{"CPU": 4.0, "GPU": 2.0}], 100, 4, False),
        (ONE, [{"CPU": 8.0, "GPU": 2.0}, BIG], 100, 2, True),
        (WorkerOptions(workers=2, cpus_per_worker=1), [BIG], 100, 2, False),
    ],
)
def test_workers_are_what_the_nodes_hold(
    options: WorkerOptions, nodes: list[Resources], tasks: int, workers: int, use_gpu: bool
) -> None:
    found = scaling(options, nodes, tasks, grows=False)
    assert (found.num_workers, found.use_gpu) == (workers, use_gpu)


@pytest.mark.parametrize(
    ("options", "nodes", "tasks", "cpus"),
    [
        (WorkerOptions(), [{"CPU": 2.0}], 1, 2),
        (WorkerOptions(), [{"CPU": 2.0}], 2, 1),
        (WorkerOptions(), [{"CPU": 2.0}], 15, 1),
        (WorkerOptions(), [BIG], 3, 2),
        (WorkerOptions(), [{"CPU": 64.0}], 1, 8),
        (WorkerOptions(workers=1), [BIG], 15, 8),
        (WorkerOptions(cpus_per_worker=3), [BIG], 1, 3),
        (WorkerOptions(), [{"CPU": 3.0}, {"CPU": 3.0}], 3, 1),
        (WorkerOptions(), [{"CPU": 3.0}, {"CPU": 3.0}], 2, 3),
        (WorkerOptions(), [{"CPU": 16.0, "GPU": 2.0}], 15, 8),
        (WorkerOptions(gpus_per_worker=0.25), [{"CPU": 16.0, "GPU": 2.0}], 15, 2),
        (WorkerOptions(), [{"CPU": 0.0}], 15, 1),
    ],
)
def test_cores_are_shared_out_among_the_workers_that_there_is_work_for(
    options: WorkerOptions, nodes: list[Resources], tasks: int, cpus: int
) -> None:
    assert shared_out(options, nodes, tasks).cpus_per_worker == cpus


@pytest.mark.parametrize(
    ("options", "nodes"),
    [
        (WorkerOptions(workers=9, cpus_per_worker=1), [BIG]),
        (WorkerOptions(cpus_per_worker=9), [BIG]),
        (WorkerOptions(cpus_per_worker=5), [{"CPU": 4.0}, {"CPU": 4.0}]),
        (WorkerOptions(workers=2, cpus_per_worker=1), [{"CPU": 8.0, "GPU": 1.0}]),
        (ONE, []),
    ],
)
def test_workers_that_do_not_fit_are_refused_at_once(options: WorkerOptions, nodes: list[Resources]) -> None:
    with pytest.raises(ConfigError, match="do not fit the cluster"):
        scaling(options, nodes, 100, grows=False)


def test_on_a_cluster_the_group_is_as_large_as_nodes_come() -> None:
    two = [{"CPU": 2.0}]
    assert scaling(ONE, two, 5, grows=True).num_workers == (1, 5)
    assert scaling(WorkerOptions(workers=3, cpus_per_worker=1), two, 5, grows=True).num_workers == (1, 3)
    with pytest.raises(ConfigError, match="do not fit the cluster"):
        scaling(WorkerOptions(cpus_per_worker=3), two, 5, grows=True)


def test_the_plan_says_what_a_node_would_fit() -> None:
    nodes: list[Resources] = [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 16.0}]
    assert planned(WorkerOptions(), nodes, 15, nodes[0]) == "1 at once, 8 CPUs, 1 GPU each"
    assert planned(WorkerOptions(), nodes, 15, nodes[2]) == ""


def failing(times: int) -> tuple[Callable[[], None], list[int]]:
    calls: list[int] = []

    def train() -> None:
        calls.append(len(calls))
        if len(calls) <= times:
            raise ray.train.TrainingFailedError

    return train, calls


def test_training_starts_anew_as_often_as_nodes_are_lost() -> None:
    train, calls = failing(20)
    again_while_nodes_are_lost(train, lambda: len(calls))
    assert len(calls) == 21
    train, calls = failing(20)
    with pytest.raises(ray.train.TrainingFailedError):
        again_while_nodes_are_lost(train, lambda: min(len(calls), 3))
    assert len(calls) == 4
