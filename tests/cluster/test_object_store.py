"""An object store that is too small for what is on its way: Ray spills to disk, and the rows are the same."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest
from ray.cluster_utils import Cluster

from tests.cluster.conftest import TINY_RECIPE, run_job, start_job
from tests.datasets import encoded, make_category

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

IMAGES = 400
# The least that Ray takes.
STORE_BYTES = 80 * 2**20


def rows(out: Path) -> dict[str, tuple[float, bytes]]:
    table = ds.dataset(out / "scores").to_table(columns=["uri", "score", "anomaly_map"]).to_pylist()
    assert len(table) == IMAGES
    return {row["uri"]: (row["score"], row["anomaly_map"]) for row in table}


def test_a_full_object_store_costs_time_and_not_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_category(str(tmp_path / "data"), "nut")
    large = [*TINY_RECIPE[:-4], "--size", "320", "--batch-size", "4", "--epochs", "1"]
    fit = ["--data", str(tmp_path / "data"), "--models", str(tmp_path / "models"), *large]
    assert run_job("fit", *fit).returncode == 0
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(IMAGES):
        (tmp_path / "images" / f"{i:04}.png").write_bytes(encoded(rng.integers(90, 130, (48, 40, 3), dtype=np.uint8)))
    options = ["--models", str(tmp_path / "models"), "--images", str(tmp_path / "images"), "--category", "nut"]
    options += ["--raw-maps", "--heatmaps", "none", "--top", "0"]
    assert run_job("score", *options, "--out", str(tmp_path / "roomy")).returncode == 0

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    spilled = tmp_path / "spilled"
    spilling = {"type": "filesystem", "params": {"directory_path": str(spilled)}}
    small = {
        "num_cpus": 2,
        "object_store_memory": STORE_BYTES,
        "_system_config": {"object_spilling_config": json.dumps(spilling), "min_spilling_size": 0},
    }
    cluster = Cluster(initialize_head=True, head_node_args=small)
    try:
        client = {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}
        process = start_job("score", *options, "--out", str(tmp_path / "tight"), **client)
        seen = False
        while process.poll() is None:
            seen = seen or any(path.is_file() for path in spilled.rglob("*"))
            time.sleep(0.1)
        print(*process.communicate(), sep="\n")
    finally:
        cluster.shutdown()
    assert process.returncode == 0
    assert seen, "nothing was spilled: the store was not too small"
    assert rows(tmp_path / "tight") == rows(tmp_path / "roomy")
