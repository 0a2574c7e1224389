"""Scoring with an object store that is too small: Ray spills to disk, and the rows are the same."""

import json
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from stpm.options import Size
from tests.cluster.conftest import fit, make_images, read_rows, run_job, start_job
from tests.datasets import make_category

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

IMAGES = 400
# The minimum that Ray accepts.
STORE_BYTES = 80 * 2**20


def rows(out: Path) -> dict[str, tuple[float, bytes]]:
    found = read_rows(out, "uri", "score", "anomaly_map")
    assert len(found) == IMAGES
    return {row["uri"]: (row["score"], row["anomaly_map"]) for row in found}


def test_scoring_with_a_full_object_store_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_category(str(tmp_path / "data"), "nut")
    fit(tmp_path / "data", tmp_path / "models", size=Size("320"))
    make_images(str(tmp_path / "images"), IMAGES)
    options = ["--models", str(tmp_path / "models"), "--images", str(tmp_path / "images"), "--category", "nut"]
    options += ["--raw-maps", "--heatmaps", "none", "--top", "0"]
    assert run_job("score", *options, "--out", str(tmp_path / "large")).returncode == 0

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    spilled = tmp_path / "spilled"
    spilling = {"type": "filesystem", "params": {"directory_path": str(spilled)}}
    small_store = {
        "num_cpus": 2,
        "object_store_memory": STORE_BYTES,
        "_system_config": {"object_spilling_config": json.dumps(spilling), "min_spilling_size": 0},
    }
    cluster = Cluster(initialize_head=True, head_node_args=small_store)
    try:
        client = {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}
        process = start_job("score", *options, "--out", str(tmp_path / "small"), **client)
        seen = False
        while process.poll() is None:
            seen = seen or any(path.is_file() for path in spilled.rglob("*"))
            time.sleep(0.1)
        print(*process.communicate(), sep="\n")
    finally:
        cluster.shutdown()
    assert process.returncode == 0
    assert seen, "nothing was spilled: the store was not too small"
    assert rows(tmp_path / "small") == rows(tmp_path / "large")
