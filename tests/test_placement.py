"""What several machines can reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from stpm.cluster.placement import check_reach, first_bundle
from stpm.errors import ConfigError
from stpm.options import ClusterOptions

URIS = ["s3://b/a", "gs://b/a", "", "/mnt/plant", "/mnt/plant/a/b", "file:///mnt/plant/c"]


def test_what_every_machine_mounts_and_what_is_in_object_storage_is_within_reach() -> None:
    check_reach(URIS, ["/mnt/plant/"], several=True)
    check_reach([*URIS, "/home/a"], [], several=False)
    check_reach([*URIS, "/home/a"], ["/"], several=True)


@pytest.mark.parametrize("lost", ["/home/a", "/mnt/plants", "/mnt", "relative"])
def test_a_path_of_one_machine_is_named(lost: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_reach([*URIS, lost], ["/mnt/plant"], several=True)
    assert str(caught.value).startswith(f"{Path(lost).absolute()}: a path of one machine")
    assert "--mounted" in str(caught.value)


def test_a_way_out_of_what_is_mounted_is_not_taken() -> None:
    with pytest.raises(ConfigError, match="a path of one machine"):
        check_reach(["/mnt/plant/../../home/a"], ["/mnt/plant"], several=True)


def test_the_first_node_and_how_long_to_wait_for_it() -> None:
    assert first_bundle("gpu") == {"CPU": 1.0, "GPU": 1.0}
    assert first_bundle("cpu") == {"CPU": 2.0}
    with pytest.raises(ConfigError, match="node-minutes is -1"):
        ClusterOptions(node_minutes=-1)
