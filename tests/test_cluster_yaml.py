"""The node types of cluster.yaml against what the jobs ask for."""

from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config

from stpm.cluster.placement import first_bundle
from stpm.fitting.options import WorkerOptions
from stpm.fitting.worker_resources import choose_worker_resources, scaling_config
from stpm.scoring.scorer_pool import ScorerPool
from tests.conftest import REPOSITORY


@pytest.fixture
def config() -> dict[str, Any]:
    prepared: dict[str, Any] = prepare_config(yaml.safe_load((REPOSITORY / "cluster.yaml").read_text()))
    return prepared


def test_the_head_runs_no_tasks_and_every_node_requires_the_token(config: dict[str, Any]) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert any("--num-cpus=0" in command for command in config["head_start_ray_commands"])
    assert "/home/ubuntu/.ray/auth_token" in config["file_mounts"]
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in commands if " start " in command)


def test_fit_workers_and_scorers_fit_the_gpu_nodes(config: dict[str, Any]) -> None:
    gpu = config["available_node_types"]["gpu"]
    nodes = gpu["max_workers"]
    assert 1 <= nodes <= config["max_workers"]
    each = [{name: float(amount) for name, amount in gpu["resources"].items()}] * nodes
    resources = choose_worker_resources(WorkerOptions(), each, 100)
    assert scaling_config(WorkerOptions(), resources, each, 100, elastic=False).num_workers == nodes
    pool = ScorerPool.for_nodes(0, each, blocks=100, grows=False)
    assert (pool.size, pool.scorer_gpus) == (nodes, 1.0)
    assert pool.scorer_cpus + 8 * pool.task_cpus <= gpu["resources"]["CPU"]


def test_the_first_node_fits_a_node_type(config: dict[str, Any]) -> None:
    kinds = config["available_node_types"]
    assert all(kinds[name]["min_workers"] == 0 for name in ("gpu", "cpu"))
    for first in ("gpu", "cpu"):
        wanted = first_bundle(first)
        assert all(kinds[first]["resources"].get(kind, 0) >= amount for kind, amount in wanted.items())


def test_jobs_request_no_more_than_the_gpu_nodes_hold(config: dict[str, Any]) -> None:
    """Ray's autoscaler ignores a request for more than it may start."""
    (start,) = (command for command in config["head_start_ray_commands"] if " start " in command)
    nodes = config["available_node_types"]["gpu"]["max_workers"]
    assert f"STPM_FIRST_NODE=gpu STPM_WORKERS={nodes} STPM_SCORERS={nodes} " in start
    rayjob = yaml.safe_load((REPOSITORY / "deploy" / "rayjob.yaml").read_text())["spec"]
    gpu = rayjob["rayClusterSpec"]["workerGroupSpecs"][0]
    assert f"--first-node gpu --scorers {gpu['maxReplicas']} " in rayjob["entrypoint"]


def test_cpu_nodes_fetch_and_decode(config: dict[str, Any]) -> None:
    cpu = config["available_node_types"]["cpu"]
    assert "GPU" not in cpu["resources"]
    pool = ScorerPool.for_nodes(0, [config["available_node_types"]["gpu"]["resources"]], blocks=100, grows=False)
    assert cpu["resources"]["CPU"] >= 8 * pool.task_cpus
