from __future__ import annotations

import pytest

from stpm.errors import ConfigError
from stpm.fitting.pool import PoolOptions, Resources, scaling, shared_out
from stpm.scoring.pipeline import ScorerPool

ONE, BIG = PoolOptions(cpus_per_worker=1), {"CPU": 8.0}


@pytest.mark.parametrize(
    ("options", "nodes", "tasks", "workers", "use_gpu"),
    [
        (ONE, [BIG], 100, 8, False),
        (ONE, [BIG], 3, 3, False),
        (PoolOptions(cpus_per_worker=4), [BIG], 100, 2, False),
        # A worker is never split: three cores and three are two workers of two.
        (PoolOptions(cpus_per_worker=2), [{"CPU": 3.0}, {"CPU": 3.0}], 100, 2, False),
        (ONE, [{"CPU": 8.0, "GPU": 2.0}], 100, 2, True),
        (PoolOptions(cpus_per_worker=1, gpus_per_worker=0.25), [{"CPU": 64.0, "GPU": 2.0}], 100, 8, True),
        (PoolOptions(cpus_per_worker=1, gpus_per_worker=0.25), [{"CPU": 3.0, "GPU": 2.0}], 100, 3, True),
        (PoolOptions(cpus_per_worker=1, gpus_per_worker=0.1), [{"CPU": 64.0, "GPU": 1.0}], 100, 10, True),
        (PoolOptions(cpus_per_worker=1, gpus_per_worker=0), [{"CPU": 4.0, "GPU": 2.0}], 100, 4, False),
        (ONE, [{"CPU": 8.0, "GPU": 2.0}, BIG], 100, 2, True),
        (PoolOptions(workers=2, cpus_per_worker=1), [BIG], 100, 2, False),
    ],
)
def test_workers_are_what_the_nodes_hold(
    options: PoolOptions, nodes: list[Resources], tasks: int, workers: int, use_gpu: bool
) -> None:
    found = scaling(options, nodes, tasks)
    assert (found.num_workers, found.use_gpu) == (workers, use_gpu)


@pytest.mark.parametrize(
    ("options", "nodes", "tasks", "cpus"),
    [
        (PoolOptions(), [{"CPU": 2.0}], 1, 2),
        (PoolOptions(), [{"CPU": 2.0}], 2, 1),
        (PoolOptions(), [{"CPU": 2.0}], 15, 1),
        (PoolOptions(), [BIG], 3, 2),
        (PoolOptions(), [{"CPU": 64.0}], 1, 8),
        (PoolOptions(workers=1), [BIG], 15, 8),
        (PoolOptions(cpus_per_worker=3), [BIG], 1, 3),
        (PoolOptions(), [{"CPU": 3.0}, {"CPU": 3.0}], 3, 1),
        (PoolOptions(), [{"CPU": 3.0}, {"CPU": 3.0}], 2, 3),
        (PoolOptions(), [{"CPU": 16.0, "GPU": 2.0}], 15, 8),
        (PoolOptions(gpus_per_worker=0.25), [{"CPU": 16.0, "GPU": 2.0}], 15, 2),
        (PoolOptions(), [{"CPU": 0.0}], 15, 1),
    ],
)
def test_cores_are_shared_out_among_the_workers_that_there_is_work_for(
    options: PoolOptions, nodes: list[Resources], tasks: int, cpus: int
) -> None:
    assert shared_out(options, nodes, tasks).cpus_per_worker == cpus


@pytest.mark.parametrize(
    ("options", "nodes"),
    [
        (PoolOptions(workers=9, cpus_per_worker=1), [BIG]),
        (PoolOptions(cpus_per_worker=9), [BIG]),
        (PoolOptions(cpus_per_worker=5), [{"CPU": 4.0}, {"CPU": 4.0}]),
        (PoolOptions(workers=2, cpus_per_worker=1), [{"CPU": 8.0, "GPU": 1.0}]),
        (ONE, []),
    ],
)
def test_workers_that_do_not_fit_are_refused_at_once(options: PoolOptions, nodes: list[Resources]) -> None:
    with pytest.raises(ConfigError, match="do not fit the cluster"):
        scaling(options, nodes, 100)


def test_scorers_leave_ray_the_cpu_it_needs() -> None:
    for cpus in range(2, 65):
        for gpus in (0, 1, 4):
            pool = ScorerPool.of(0, {"CPU": float(cpus), "GPU": float(gpus)}, blocks=1000)
            assert cpus - pool.size * pool.num_cpus >= 1 - 1e-9, (cpus, gpus, pool)
            assert pool.size == (gpus or cpus)


def test_scorers_that_do_not_fit_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="3 scorers do not fit 2 CPU cores"):
        ScorerPool.of(3, {"CPU": 2.0}, blocks=9)
    with pytest.raises(ConfigError, match="the cluster has 1 CPUs"):
        ScorerPool.of(0, {"CPU": 1.0}, blocks=9)
