from contextlib import nullcontext

import pytest
import ray.train
from ray.train import ScalingConfig

from stpm.cluster.connection import Resources
from stpm.errors import ConfigError
from stpm.fitting import worker_resources
from stpm.fitting.options import WorkerOptions
from stpm.fitting.worker_group import retry_after_node_loss
from stpm.fitting.worker_resources import choose_worker_resources, describe_workers, scaling_config


def scale(options: WorkerOptions, nodes: list[Resources], tasks: int, *, elastic: bool = False) -> ScalingConfig:
    return scaling_config(options, choose_worker_resources(options, nodes, tasks), nodes, tasks, elastic=elastic)


ONE, BIG = WorkerOptions(cpus_per_worker=1), {"CPU": 8.0}


@pytest.mark.parametrize(
    ("options", "nodes", "tasks", "workers", "cpus"),
    [
        (ONE, [BIG], 100, 8, 1),
        (ONE, [BIG], 3, 3, 1),
        (WorkerOptions(cpus_per_worker=4), [BIG], 100, 2, 4),
        # A worker is never split over two nodes: two nodes of three cores hold two workers of two.
        (WorkerOptions(cpus_per_worker=2), [{"CPU": 3.0}, {"CPU": 3.0}], 100, 2, 2),
        (ONE, [{"CPU": 8.0, "GPU": 2.0}], 100, 2, 1),
        (WorkerOptions(cpus_per_worker=1, gpus_per_worker=0.25), [{"CPU": 64.0, "GPU": 2.0}], 100, 8, 1),
        (WorkerOptions(cpus_per_worker=1, gpus_per_worker=0.25), [{"CPU": 3.0, "GPU": 2.0}], 100, 3, 1),
        (WorkerOptions(cpus_per_worker=1, gpus_per_worker=0.1), [{"CPU": 64.0, "GPU": 1.0}], 100, 10, 1),
        (WorkerOptions(cpus_per_worker=1, gpus_per_worker=0), [{"CPU": 4.0, "GPU": 2.0}], 100, 4, 1),
        (ONE, [{"CPU": 8.0, "GPU": 2.0}, BIG], 100, 2, 1),
        (WorkerOptions(workers=2, cpus_per_worker=1), [BIG], 100, 2, 1),
        # More workers than tasks are never started.
        (WorkerOptions(workers=9, cpus_per_worker=1), [BIG], 1, 1, 1),
        # CPUs are divided among workers that have tasks.
        (WorkerOptions(), [{"CPU": 2.0}], 1, 1, 2),
        (WorkerOptions(), [{"CPU": 2.0}], 2, 2, 1),
        (WorkerOptions(), [BIG], 3, 3, 2),
        (WorkerOptions(), [{"CPU": 64.0}], 1, 1, 8),
        (WorkerOptions(workers=1), [BIG], 15, 1, 8),
        (WorkerOptions(workers=8), [BIG], 1, 1, 8),
        (WorkerOptions(), [{"CPU": 3.0}, {"CPU": 3.0}], 3, 3, 1),
        (WorkerOptions(), [{"CPU": 3.0}, {"CPU": 3.0}], 2, 2, 3),
        (WorkerOptions(), [{"CPU": 16.0, "GPU": 2.0}], 15, 2, 8),
        (WorkerOptions(gpus_per_worker=0.25), [{"CPU": 16.0, "GPU": 2.0}], 15, 8, 2),
    ],
)
def test_workers_fill_the_nodes(
    options: WorkerOptions, nodes: list[Resources], tasks: int, workers: int, cpus: int
) -> None:
    resources, found = choose_worker_resources(options, nodes, tasks), scale(options, nodes, tasks)
    assert (found.num_workers, resources.cpus) == (workers, cpus)
    assert found.use_gpu == ("GPU" in nodes[0] and options.gpus_per_worker != 0)
    # A cluster whose nodes are all still to come.
    assert choose_worker_resources(options, [{"CPU": 0.0}], tasks).cpus == (options.cpus_per_worker or 1)


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
def test_workers_that_do_not_fit_are_refused(options: WorkerOptions, nodes: list[Resources]) -> None:
    with pytest.raises(ConfigError, match="do not fit the cluster"):
        scale(options, nodes, 100)


def test_elastic_group_has_at_most_one_worker_per_task() -> None:
    two = [{"CPU": 2.0}]
    assert scale(ONE, two, 5, elastic=True).num_workers == (1, 5)
    assert scale(WorkerOptions(workers=3, cpus_per_worker=1), two, 5, elastic=True).num_workers == (1, 3)
    with pytest.raises(ConfigError, match="do not fit the cluster"):
        scale(WorkerOptions(cpus_per_worker=3), two, 5, elastic=True)


def test_plan_describes_the_workers_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[Resources] = [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 16.0}]
    monkeypatch.setattr(worker_resources, "working_nodes", lambda: nodes)
    assert describe_workers(WorkerOptions(), 15, nodes[0]) == "1 at once, 8 CPUs, 1 GPU each"
    assert describe_workers(WorkerOptions(), 15, nodes[2]) == ""
    assert describe_workers(WorkerOptions(workers=8, gpus_per_worker=0), 1, nodes[2]) == "1 at once, 8 CPUs each"


@pytest.mark.parametrize(("lost", "calls"), [(20, 21), (3, 4)])
def test_training_is_retried_as_often_as_nodes_are_lost(lost: int, calls: int) -> None:
    called: list[int] = []

    def train() -> None:
        called.append(1)
        if len(called) <= 20:
            raise ray.train.TrainingFailedError

    with nullcontext() if lost == 20 else pytest.raises(ray.train.TrainingFailedError):
        retry_after_node_loss(train, lambda: min(len(called), lost))
    assert len(called) == calls
