"""How scorers are shared out over the nodes of a cluster."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stpm.errors import ConfigError
from stpm.scoring.pipeline import STAGE_CPUS, ScorerPool


@given(st.lists(st.integers(1, 96), min_size=1, max_size=6))
def test_each_core_has_a_scorer_and_the_other_stages_have_room(cores: list[int]) -> None:
    pool = ScorerPool.of(0, [{"CPU": float(n)} for n in cores], blocks=10_000, grows=False)
    assert (pool.size, pool.most, pool.num_gpus) == (sum(cores), sum(cores), 0.0)
    for n in cores:
        assert n - n * pool.num_cpus < pool.num_cpus, "a node has room for more scorers than cores"
    assert max(n - n * pool.num_cpus for n in cores) >= STAGE_CPUS


@given(
    st.lists(st.tuples(st.integers(1, 96), st.integers(0, 8)), min_size=1, max_size=6).filter(
        lambda n: any(g for _, g in n)
    )
)
def test_each_gpu_has_a_scorer_and_the_other_stages_have_room(kinds: list[tuple[int, int]]) -> None:
    nodes = [{"CPU": float(cpus), "GPU": float(gpus)} for cpus, gpus in kinds]
    pool = ScorerPool.of(0, nodes, blocks=10_000, grows=False)
    assert (pool.size, pool.num_gpus) == (sum(gpus for _, gpus in kinds), 1.0)
    assert 0 < pool.num_cpus <= 1
    assert all(cpus - gpus * pool.num_cpus >= STAGE_CPUS - 1e-9 for cpus, gpus in kinds if gpus)


def test_the_pool_grows_with_the_cluster_and_not_beyond_what_was_asked_for() -> None:
    nodes = [{"CPU": 8.0, "GPU": 1.0}]
    assert ScorerPool.of(0, nodes, blocks=100, grows=True) == ScorerPool(1, 100, 1.0, 1.0)
    assert ScorerPool.of(4, nodes, blocks=100, grows=True) == ScorerPool(1, 4, 1.0, 1.0)
    assert ScorerPool.of(0, nodes, blocks=1, grows=True).most == 1


def test_scorers_that_do_not_fit_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="3 scorers do not fit 2 CPU cores"):
        ScorerPool.of(3, [{"CPU": 2.0}], blocks=9, grows=False)
    with pytest.raises(ConfigError, match="no node with a CPU"):
        ScorerPool.of(0, [], blocks=9, grows=False)
