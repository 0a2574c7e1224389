from __future__ import annotations

import pytest

from stpm.errors import ConfigError
from stpm.fitting.pool import PoolOptions, scaling
from stpm.scoring.pipeline import ScorerPool


@pytest.mark.parametrize(
    ("options", "resources", "tasks", "workers", "use_gpu"),
    [
        (PoolOptions(), {"CPU": 8.0}, 100, 8, False),
        (PoolOptions(), {"CPU": 8.0}, 3, 3, False),
        (PoolOptions(cpus_per_worker=4), {"CPU": 8.0}, 100, 2, False),
        (PoolOptions(), {"CPU": 8.0, "GPU": 2.0}, 100, 2, True),
        (PoolOptions(gpus_per_worker=0.25), {"CPU": 64.0, "GPU": 2.0}, 100, 8, True),
        (PoolOptions(gpus_per_worker=0.25), {"CPU": 3.0, "GPU": 2.0}, 100, 3, True),
        (PoolOptions(gpus_per_worker=0), {"CPU": 4.0, "GPU": 2.0}, 100, 4, False),
        (PoolOptions(workers=2), {"CPU": 8.0}, 100, 2, False),
    ],
)
def test_workers_are_what_the_cluster_has(
    options: PoolOptions, resources: dict[str, float], tasks: int, workers: int, use_gpu: bool
) -> None:
    found = scaling(options, resources, tasks)
    assert (found.num_workers, found.use_gpu) == (workers, use_gpu)


@pytest.mark.parametrize(
    ("options", "resources"),
    [
        (PoolOptions(workers=9), {"CPU": 8.0}),
        (PoolOptions(cpus_per_worker=9), {"CPU": 8.0}),
        (PoolOptions(workers=2), {"CPU": 8.0, "GPU": 1.0}),
        (PoolOptions(), {}),
    ],
)
def test_workers_that_do_not_fit_are_refused_at_once(options: PoolOptions, resources: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="do not fit the cluster"):
        scaling(options, resources, 100)


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
