"""The three jobs by `ray job submit`, on a cluster that demands a token."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from stpm.models import ModelStore
from tests.cluster.conftest import TINY_RECIPE, environment
from tests.conftest import REPOSITORY
from tests.datasets import make_category

pytestmark = pytest.mark.cluster

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment of a client of a fresh cluster with a dashboard."""
    token = secrets.token_hex(16)
    settings = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token, PATH=f"{BIN}:{os.environ['PATH']}")
    dashboard = free_port()
    process = subprocess.Popen(
        [
            *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={free_port()}"),
            *("--include-dashboard=true", f"--dashboard-port={dashboard}", "--node-ip-address=127.0.0.1"),
        ],
        env=settings,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{dashboard}"
    request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(request, timeout=5).close()
            break
        except OSError:
            assert process.poll() is None, "the cluster did not start"
            assert time.monotonic() < deadline, "the dashboard did not come up"
            time.sleep(0.5)
    yield settings | {"RAY_API_SERVER_ADDRESS": address}
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)


def submit(client: dict[str, str], job: str, *options: str) -> subprocess.CompletedProcess[str]:
    process = subprocess.run(
        [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", "python", f"jobs/{job}.py", *options],
        env=client,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    print(process.stdout, process.stderr, sep="\n")
    return process


def test_without_the_token_nothing_is_submitted(cluster: dict[str, str]) -> None:
    process = submit(cluster | {"RAY_AUTH_TOKEN": "guessed"}, "fit", "--help")
    assert process.returncode != 0
    assert "succeeded" not in process.stdout + process.stderr


def test_the_three_jobs(cluster: dict[str, str], tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    make_category(data, "nut")
    tiny = ["--epochs", "2", *TINY_RECIPE]

    fit = submit(cluster, "fit", "--data", data, "--models", str(tmp_path / "models"), *tiny)
    assert fit.returncode == 0
    assert "validation loss" in fit.stdout
    assert ModelStore(str(tmp_path / "models")).categories() == ["nut"]

    options = ["--models", str(tmp_path / "models"), "--images", f"{data}/nut/test", "--category", "nut"]
    score = submit(cluster, "score", *options, "--out", str(tmp_path / "scored"))
    assert score.returncode == 0
    assert ds.dataset(tmp_path / "scored" / "scores").count_rows() == 8

    benchmark = submit(cluster, "benchmark", "--data", data, "--out", str(tmp_path / "run"), *tiny)
    assert benchmark.returncode == 0
    assert "image AUROC" in benchmark.stdout
    assert json.loads((tmp_path / "run" / "report.json").read_text())["mean"]["image_auroc"] is not None

    failed = submit(cluster, "fit", "--data", str(tmp_path / "nowhere"), "--models", str(tmp_path / "m"), *tiny)
    assert failed.returncode != 0
    assert "nowhere: no such folder" in failed.stdout + failed.stderr
