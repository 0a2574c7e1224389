from dataclasses import replace

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray.data import ExecutionResources
from ray.data._internal.cluster_autoscaler import RateBasedClusterAutoscaler
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import STANDARD_RESOURCE_TYPES
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import _AutoscalingCoordinatorActor

from stpm.errors import ConfigError
from stpm.scoring import pipeline, scorer_pool
from stpm.scoring.options import ScoreOptions
from stpm.scoring.pipeline import patch_ray_to_count_all_cpus
from stpm.scoring.scorer_pool import ScorerPool, describe_plan


@given(st.lists(st.integers(1, 96), min_size=1, max_size=6))
def test_each_core_has_a_scorer_and_two_tasks_of_the_other_stages(cores: list[int]) -> None:
    pool = ScorerPool.for_nodes(0, [{"CPU": float(n)} for n in cores], blocks=10_000, grows=False)
    assert (pool.size, pool.max_size, pool.scorer_gpus) == (sum(cores), sum(cores), 0.0)
    for n in cores:
        rest = n - n * pool.scorer_cpus
        assert rest < pool.scorer_cpus, "a node has room for more scorers than cores"
        assert rest / pool.task_cpus + 1e-6 >= n
    assert max(n - n * pool.scorer_cpus for n in cores) + 1e-9 >= 2 * max(cores) * pool.task_cpus


@given(
    st.lists(st.tuples(st.integers(1, 96), st.integers(0, 8)), min_size=1, max_size=6).filter(
        lambda n: any(g for _, g in n)
    )
)
def test_each_gpu_has_a_scorer_and_the_other_stages_have_room(kinds: list[tuple[int, int]]) -> None:
    nodes = [{"CPU": float(cpus), "GPU": float(gpus)} for cpus, gpus in kinds]
    pool = ScorerPool.for_nodes(0, nodes, blocks=10_000, grows=False)
    assert (pool.size, pool.scorer_gpus) == (sum(gpus for _, gpus in kinds), 1.0)
    assert 0 < pool.scorer_cpus <= 1
    assert all(cpus - gpus * pool.scorer_cpus >= pool.task_cpus - 1e-9 for cpus, gpus in kinds if gpus)


KINDS = [*((n, 0) for n in (1, 2, 3, 4, 8, 16, 64)), (1, 1), (2, 1), (4, 1), (8, 1), (4, 4), (6, 4), (7, 5), (32, 4)]


def counted_cpus(nodes: list[dict[str, float]], request: list[dict[str, float]]) -> float:
    """Return the CPUs that Ray Data counts on after an autoscaler's request: what its own coordinator reserves."""
    listed = [{"NodeID": str(i), "Alive": True, "Resources": dict(node)} for i, node in enumerate(nodes)]
    coordinator = _AutoscalingCoordinatorActor(
        send_resources_request=lambda *_args, **_options: None, get_cluster_nodes=lambda: listed
    )
    coordinator.request_resources("run", request, 60, request_remaining=STANDARD_RESOURCE_TYPES)
    return sum(node["CPU"] for node in coordinator.get_reserved_resources("run").values())


def reserved_cpus(pool: ScorerPool, total: float, stages: int) -> tuple[float, float, float]:
    """Return the CPUs of the stages decode, score and write.

    Reserve as Ray Data 2.60 does in `ReservationOpResourceAllocator`, written plainly.
    """
    assert ray.__version__.startswith("2.60."), "write this as the new version reserves"
    got = []
    for wanted in (pool.task_cpus, pool.size * pool.scorer_cpus, pool.task_cpus):
        reserved = max(wanted, pool.reserved_fraction * total / stages)
        got.append(reserved if reserved <= total - sum(got) + 1e-9 else 0)
    decode, score, write = got
    return decode, score, write


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("cpus", "gpus"), KINDS)
def test_the_writing_stage_has_reserved_cpus(cpus: int, gpus: int, count: int) -> None:
    nodes = [{"CPU": float(cpus), "GPU": float(gpus)}] * count
    pool = ScorerPool.for_nodes(0, nodes, blocks=10_000, grows=False)
    # While the manifest is read there is one more stage, which takes no CPUs.
    for stages in (3, 4):
        decode, _, write = reserved_cpus(pool, float(cpus * count), stages)
        assert decode
        assert write


def test_what_rays_coordinator_leaves_starves_the_writing_stage() -> None:
    """If this fails, Ray is mended: delete `patch_ray_to_count_all_cpus`."""
    nodes = [{"CPU": 1.0}] * 3
    pool = ScorerPool.for_nodes(0, nodes, blocks=10_000, grows=True)
    task, scorer = {"CPU": pool.task_cpus}, {"CPU": pool.scorer_cpus}
    # As Ray Data requested in a run of 30,000 images.
    total = counted_cpus(nodes, [task] * 5 + [scorer] * 6 + [task] * 3)
    assert total == pytest.approx(1.9994)
    assert reserved_cpus(pool, total, stages=3)[2] == 0


def test_ray_data_counts_on_all_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RateBasedClusterAutoscaler, "get_total_resources", None)
    monkeypatch.setattr(pipeline, "working_nodes", lambda: [{"CPU": 8.0, "GPU": 1.0, "memory": 8e9}, {"CPU": 16.0}])
    patch_ray_to_count_all_cpus()
    autoscaler = object.__new__(RateBasedClusterAutoscaler)
    assert autoscaler.get_total_resources() == ExecutionResources(cpu=24, gpu=1, memory=8e9)


def test_the_pool_grows_with_the_cluster_up_to_the_requested_size() -> None:
    # Beside a GPU's scorer two tasks share a core.
    nodes = [{"CPU": 8.0, "GPU": 1.0, "memory": 32e9}, {"CPU": 16.0, "memory": 8e9}]
    fixed = ScorerPool.for_nodes(0, nodes, blocks=100, grows=False)
    assert fixed == replace(
        fixed, size=1, max_size=1, scorer_cpus=1.0, scorer_gpus=1.0, task_cpus=0.5, reserved_fraction=0.5
    )
    for scorers, blocks, most in ((0, 100, 100), (4, 100, 4), (0, 1, 1)):
        assert ScorerPool.for_nodes(scorers, nodes, blocks=blocks, grows=True) == replace(fixed, max_size=most)
    # Tasks request their memory, up to a fraction of the smallest node's.
    assert (fixed.ram_for(10**9), fixed.ram_for(10**10)) == (1e9, 2e9)


def test_scorers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 scorers do not fit 2 CPU cores"):
        ScorerPool.for_nodes(3, [{"CPU": 2.0}], blocks=9, grows=False)
    with pytest.raises(ConfigError, match="no node with a CPU"):
        ScorerPool.for_nodes(0, [], blocks=9, grows=False)


@pytest.mark.parametrize(
    ("scorers", "nodes", "described"),
    [
        # The head of a cluster whose workers were all given back.
        (0, [{"memory": 8e9}], [""]),
        (0, [{}, {"CPU": 2.0}], ["", "2 scorers of 0.6667 CPU; 4 tasks that fetch, decode and write"]),
        (1, [{"CPU": 2.0}] * 3, ["up to 1 scorer of 0.6667 CPU; 8 tasks that fetch, decode and write"] * 3),
        (
            0,
            [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 16.0}],
            [
                "1 scorer of 1 CPU, 1 GPU; 14 tasks that fetch, decode and write",
                "32 tasks that fetch, decode and write",
            ],
        ),
    ],
)
def test_the_plan_names_what_each_node_would_run(
    monkeypatch: pytest.MonkeyPatch, scorers: int, nodes: list[dict[str, float]], described: list[str]
) -> None:
    monkeypatch.setattr(scorer_pool, "working_nodes", lambda: [node for node in nodes if "CPU" in node])
    monkeypatch.setattr(scorer_pool, "is_shared", lambda: True)
    assert [describe_plan(ScoreOptions(scorers=scorers), node) for node in nodes] == described
