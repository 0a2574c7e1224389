"""The three jobs by `ray job submit`, on a cluster that demands a token, with all data in S3."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stpm import storage
from stpm.models.store import ModelStore
from tests.cluster.conftest import TINY_RECIPE, committed, environment, free_port, kill_tree, wait_until
from tests.conftest import REPOSITORY
from tests.datasets import encoded, make_category

pytestmark = pytest.mark.cluster

BIN = Path(sys.executable).parent
TINY = ["--epochs", "2", *TINY_RECIPE]
DATA, MODELS = "s3://bucket/data", "s3://bucket/models"


@pytest.fixture(scope="module")
def metrics() -> str:
    """Where the cluster's node tells what it counts."""
    return f"http://127.0.0.1:{free_port()}/metrics"


@pytest.fixture(scope="module")
def cluster(s3: dict[str, str], metrics: str) -> Iterator[dict[str, str]]:
    """The environment of a client of a fresh cluster; its nodes have the credentials, the client has not."""
    token = secrets.token_hex(16)
    settings = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token, PATH=f"{BIN}:{os.environ['PATH']}")
    dashboard = free_port()
    process = subprocess.Popen(
        [
            *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={free_port()}"),
            *("--include-dashboard=true", f"--dashboard-port={dashboard}", "--node-ip-address=127.0.0.1"),
            f"--metrics-export-port={re.search(r':([0-9]+)/', metrics)[1]}",  # type: ignore[index]
            # Jobs go through the node's agent. Its default port may still be held by the cluster of an earlier test.
            f"--dashboard-agent-listen-port={free_port()}",
        ],
        env=settings | {"RAY_metrics_report_interval_ms": "500"},
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
    without = {name: value for name, value in settings.items() if name not in s3}
    yield without | {"RAY_API_SERVER_ADDRESS": address}
    kill_tree(process)


def ray_job(client: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    process = subprocess.run(
        [str(BIN / "ray"), "job", *arguments],
        env=client,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    print(process.stdout, process.stderr, sep="\n")
    assert "that-no-log-may-show" not in process.stdout + process.stderr
    return process


def submit(client: dict[str, str], job: str, *options: str) -> subprocess.CompletedProcess[str]:
    return ray_job(client, "submit", "--working-dir", ".", "--", "python", f"jobs/{job}.py", *options)


@contextlib.contextmanager
def counted(metrics: str) -> Iterator[dict[str, float]]:
    """What the node counted while the block ran, by name: the largest value seen."""
    seen: dict[str, float] = {}
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.3):
            with contextlib.suppress(OSError), urllib.request.urlopen(metrics, timeout=5) as answer:
                for line in answer.read().decode().splitlines():
                    if match := re.match(r"(ray_stpm\w+)(?:{.*})? (\S+)$", line):
                        seen[match[1]] = max(seen.get(match[1], 0.0), float(match[2]))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
        time.sleep(2)
    finally:
        stop.set()
        thread.join()


def test_without_the_token_nothing_is_submitted(cluster: dict[str, str]) -> None:
    process = submit(cluster | {"RAY_AUTH_TOKEN": "guessed"}, "fit", "--help")
    assert process.returncode != 0
    assert "succeeded" not in process.stdout + process.stderr


def test_the_three_jobs_and_what_the_dashboard_draws_of_them(cluster: dict[str, str], metrics: str) -> None:
    make_category(DATA, "nut")
    fit = submit(cluster, "fit", "--data", DATA, "--models", MODELS, *TINY)
    assert fit.returncode == 0
    assert "validation loss" in fit.stdout
    assert ModelStore(MODELS).categories() == ["nut"]

    rng = np.random.default_rng(0)
    for i in range(600):
        pixels = rng.integers(90, 130, (48, 40, 3), dtype=np.uint8)
        storage.publish(f"s3://bucket/images/{i:04}.png", encoded(pixels) if i % 100 else b"broken")
    options = ["--models", MODELS, "--images", "s3://bucket/images", "--category", "nut", "--out", "s3://bucket/scored"]
    with counted(metrics) as seen:
        score = submit(cluster, "score", *options)
    assert score.returncode == 0
    assert len(scored("s3://bucket/scored")) == 600
    drawn = set(re.findall(r"ray_stpm\w+", (REPOSITORY / "deploy" / "grafana.json").read_text()))
    assert drawn == {name for name, value in seen.items() if value > 0 and name.endswith("_total")}

    benchmark = submit(cluster, "benchmark", "--data", DATA, "--out", "s3://bucket/run", *TINY)
    assert benchmark.returncode == 0
    assert "image AUROC" in benchmark.stdout
    assert json.loads(storage.read("s3://bucket/run/report.json"))["mean"]["image_auroc"] is not None

    failed = submit(cluster, "fit", "--data", "s3://bucket/nowhere", "--models", "s3://bucket/m", *TINY)
    assert failed.returncode != 0
    assert "nowhere: no such folder" in failed.stdout + failed.stderr


def scored(out: str) -> list[str]:
    """URIs of the rows."""
    return [uri for file, _ in storage.files(f"{out}/scores") for uri in storage.read_table(file)["uri"].to_pylist()]


def test_a_job_that_is_stopped_says_so_and_the_next_one_goes_on(cluster: dict[str, str]) -> None:
    """Needs the models and the images of the test before."""
    out = "s3://bucket/stopped"
    options = ["--models", MODELS, "--images", "s3://bucket/images", "--category", "nut", "--out", out]
    options += ["--rows-per-file", "32", "--scoring-batch-size", "1"]
    command = ["submit", "--no-wait", "--submission-id", "night", "--working-dir", ".", "--"]
    assert ray_job(cluster, *command, "python", "jobs/score.py", *options).returncode == 0
    wait_until(lambda: bool(committed(out)), "no rows were committed")
    assert ray_job(cluster, "stop", "night").returncode == 0
    assert "stopped by SIGTERM: what was done is kept" in ray_job(cluster, "logs", "night").stdout
    assert "Job 'night' was stopped" in ray_job(cluster, "status", "night").stdout
    assert not storage.exists(f"{out}/_SUCCESS")
    again = submit(cluster, "score", *options)
    assert again.returncode == 0
    assert "are scored already" in again.stdout
    uris = scored(out)
    assert len(uris) == len(set(uris)) == 600
