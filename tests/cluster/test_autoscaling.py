"""A cluster that starts its nodes on demand, with Ray's own autoscaler and nodes that are processes here."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.util import get_node_ip_address

from tests.cluster.conftest import BIN, TINY_RECIPE, environment, free_port, kill_tree, read_rows, run_job
from tests.datasets import make_category

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

CONFIG: dict[str, Any] = {
    "cluster_name": "on-demand",
    "max_workers": 2,
    "idle_timeout_minutes": 5,
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "cpu": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    "head_node_type": "ray.head.default",
    **{f"{name}_commands": [] for name in ("setup", "initialization", "head_setup", "worker_setup")},
    **{f"{name}_start_ray_commands": [] for name in ("head", "worker")},
    **{name: [] for name in ("rsync_exclude", "rsync_filter")},
    **{name: {} for name in ("file_mounts", "auth")},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Start a head that runs no tasks, and can start up to two nodes of two CPUs."""
    port = free_port()
    address = f"{get_node_ip_address()}:{port}"
    config = tmp_path / "cluster.yaml"
    provider = {
        # By this name the default configuration of the type "fake_multinode" would be read, which Ray's wheel lacks.
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": address,
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
    }
    config.write_text(yaml.safe_dump(CONFIG | {"provider": provider}))
    # The autoscaler v2, as `ray up` and KubeRay start it.
    settings = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=0"]
    head = subprocess.Popen(
        [*command, f"--autoscaling-config={config}", "--include-dashboard=false"],
        env=environment(**settings, PATH=f"{BIN}:{os.environ['PATH']}"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(5)
    assert head.poll() is None, "the cluster did not start"
    yield {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
    kill_tree(head)


def count_nodes(client: dict[str, str]) -> int:
    """Return the number of nodes that can run tasks."""
    count = (
        "import ray; ray.init(log_to_driver=False); "
        "print(sum('CPU' in node['Resources'] for node in ray.nodes() if node['Alive']))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", count], env=environment(**client), capture_output=True, text=True, check=True
    )
    return int(ran.stdout.split()[-1])


def test_a_job_asks_for_the_first_node_and_grows_with_the_cluster(client: dict[str, str], tmp_path: Path) -> None:
    data, models, out = (str(tmp_path / name) for name in ("data", "models", "out"))
    for number in range(5):
        make_category(data, f"nut{number}")
    fit = ["--data", data, "--models", models, "--mounted", str(tmp_path), "--epochs", "100", *TINY_RECIPE]
    timed_out = run_job("fit", *fit, "--node-minutes", "0.1", **client)
    assert timed_out.returncode == 1
    assert "no node with 1 CPU and 1 GPU came in 0.1 minutes" in timed_out.stderr

    ran = run_job("fit", *fit, "--first-node", "cpu", "--workers", "2", "--cpus-per-worker", "2", **client)
    assert ran.returncode == 0
    assert "the cluster has no node with 2 CPU; asking for one" in ran.stdout
    assert count_nodes(client) == 2
    score = ["--models", models, "--images", f"{data}/nut0/test", "--category", "nut0", "--out", out]
    assert run_job("score", *score, "--mounted", str(tmp_path), **client).returncode == 0
    assert len(read_rows(out)) == 8
