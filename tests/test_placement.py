"""Which paths several machines can reach, and the first node to ask for."""

import os
from pathlib import Path
from unittest.mock import Mock, call

import pytest

from stpm.cluster import placement
from stpm.cluster.connection import connected
from stpm.cluster.placement import check_reach, first_bundle
from stpm.errors import ConfigError
from stpm.options import ClusterOptions

URIS = ["s3://b/a", "gs://b/a", "", "/mnt/plant", "/mnt/plant/a/b", "file:///mnt/plant/c"]


def test_mounted_folders_and_object_storage_are_accepted() -> None:
    check_reach(URIS, ["/mnt/plant/"])
    check_reach([*URIS, "/home/a"], ["/"])


@pytest.mark.parametrize("path", ["/home/a", "/mnt/plants", "/mnt", "relative", "/mnt/plant/../../home/a"])
def test_a_path_of_one_machine_is_refused_and_named(path: str) -> None:
    with pytest.raises(
        ConfigError, match=f"^{os.path.normpath(Path(path).absolute())}: a path of one machine, .* name with --mounted"
    ):
        check_reach([*URIS, path], ["/mnt/plant"])


def test_an_address_where_ray_cannot_connect_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with (
        pytest.raises(ConfigError, match=r"^the Ray cluster at RAY_ADDRESS=http://127.* cannot be reached: .+$"),
        connected(),
    ):
        pass


def test_the_first_node_and_the_time_to_wait_for_it() -> None:
    assert first_bundle("any") == first_bundle("gpu") == {"CPU": 1.0, "GPU": 1.0}
    assert first_bundle("cpu") == {"CPU": 2.0}
    with pytest.raises(ConfigError, match="node-minutes is -1"):
        ClusterOptions(node_minutes=-1)


CPU, GPU = {"CPU": 16.0}, {"CPU": 8.0, "GPU": 1.0}


@pytest.fixture
def request_resources(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Replace the autoscaler, of a cluster that others started."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(placement, "request_resources", request := Mock())
    monkeypatch.setattr(placement, "_POLL_SECONDS", 0.0)
    return request


def test_a_node_that_left_is_asked_for_again(request_resources: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([[CPU], [], [], [], [CPU]])
    monkeypatch.setattr(placement, "working_nodes", lambda: next(found))
    options = ClusterOptions(first_node="cpu")
    assert placement.wait_for_nodes(options) == [CPU]
    request_resources.assert_not_called()
    assert placement.wait_for_nodes(options) == [CPU]
    # Twice, as another job's request may have replaced the first one.
    wanted = call(bundles=[first_bundle("cpu")])
    assert request_resources.call_args_list == [wanted, wanted, call(bundles=[])]


def test_cpu_nodes_do_not_stand_in_for_a_gpu_node(request_resources: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([[CPU], [CPU], [CPU], [CPU, GPU], [CPU]])
    monkeypatch.setattr(placement, "working_nodes", lambda: next(found))
    assert placement.wait_for_nodes(ClusterOptions()) == [CPU]
    request_resources.assert_not_called()
    assert placement.wait_for_nodes(ClusterOptions(first_node="gpu")) == [CPU, GPU]
    assert request_resources.call_args_list == [call(bundles=[first_bundle("gpu")]), call(bundles=[])]
    # No other node comes to a cluster on this machine.
    monkeypatch.delenv("RAY_ADDRESS")
    assert placement.wait_for_nodes(ClusterOptions(first_node="gpu")) == [CPU]
