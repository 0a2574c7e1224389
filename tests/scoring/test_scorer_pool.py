"""How scorers are shared out over the nodes of a cluster."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stpm.errors import ConfigError
from stpm.scoring.scorer_pool import ScorerPool


@given(st.lists(st.integers(1, 96), min_size=1, max_size=6))
def test_each_core_has_a_scorer_and_two_tasks_of_the_other_stages(cores: list[int]) -> None:
    pool = ScorerPool.of(0, [{"CPU": float(n)} for n in cores], blocks=10_000, grows=False)
    assert (pool.size, pool.most, pool.num_gpus) == (sum(cores), sum(cores), 0.0)
    for n in cores:
        left = n - n * pool.num_cpus
        assert left < pool.num_cpus, "a node has room for more scorers than cores"
        assert left / pool.stage_cpus + 1e-6 >= n
    assert max(n - n * pool.num_cpus for n in cores) + 1e-9 >= 2 * max(cores) * pool.stage_cpus


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
    assert all(cpus - gpus * pool.num_cpus >= pool.stage_cpus - 1e-9 for cpus, gpus in kinds if gpus)


def test_two_tasks_go_to_a_core_that_feeds_a_gpu() -> None:
    pool = ScorerPool.of(0, [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 16.0}], blocks=100, grows=False)
    assert pool == ScorerPool(size=1, most=1, num_cpus=1.0, num_gpus=1.0, stage_cpus=0.5, reserved=0.5)


def test_tasks_ask_for_the_memory_that_they_take_where_a_node_has_it() -> None:
    nodes = [{"CPU": 8.0, "memory": 32e9}, {"CPU": 8.0, "memory": 8e9}]
    pool = ScorerPool.of(0, nodes, blocks=100, grows=False)
    assert (pool.memory_for(10**9), pool.memory_for(10**10)) == (1e9, 2e9)


KINDS = [*((n, 0) for n in (1, 2, 3, 4, 8, 16, 64)), (1, 1), (2, 1), (4, 1), (8, 1), (4, 4), (6, 4), (7, 5), (32, 4)]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("cpus", "gpus"), KINDS)
def test_the_stage_that_writes_has_cpus_of_its_own(cpus: int, gpus: int, count: int) -> None:
    """As Ray Data 2.60 sets them aside, in `ReservationOpResourceAllocator`, written plainly."""
    pool = ScorerPool.of(0, [{"CPU": float(cpus), "GPU": float(gpus)}] * count, blocks=10_000, grows=False)
    left = total = float(cpus * count)
    got = []
    for wanted in (pool.stage_cpus, pool.stage_cpus, pool.size * pool.num_cpus, pool.stage_cpus):
        reserved = max(wanted, pool.reserved * total / 4)
        got.append(reserved if reserved <= left + 1e-9 else 0)
        left -= got[-1]
    assert all(got[stage] for stage in (0, 1, 3))


def test_the_pool_grows_with_the_cluster_and_not_beyond_what_was_asked_for() -> None:
    nodes = [{"CPU": 8.0, "GPU": 1.0}]
    assert ScorerPool.of(0, nodes, blocks=100, grows=True) == ScorerPool(1, 100, 1.0, 1.0, 0.5, 0.5)
    assert ScorerPool.of(4, nodes, blocks=100, grows=True) == ScorerPool(1, 4, 1.0, 1.0, 0.5, 0.5)
    assert ScorerPool.of(0, nodes, blocks=1, grows=True).most == 1


def test_scorers_that_do_not_fit_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="3 scorers do not fit 2 CPU cores"):
        ScorerPool.of(3, [{"CPU": 2.0}], blocks=9, grows=False)
    with pytest.raises(ConfigError, match="no node with a CPU"):
        ScorerPool.of(0, [], blocks=9, grows=False)
