"""The jobs by `ray job submit`, on a cluster that requires a token, with all data in S3."""

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from stpm import storage
from stpm.errors import HOW_TO_CONTINUE
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import open_rows
from tests.cluster.conftest import (
    BIN,
    HANGS,
    TINY_RECIPE,
    call_job,
    environment,
    free_port,
    kill_tree,
    make_images,
    read_rows,
    wait_until,
    written_tasks,
)
from tests.conftest import REPOSITORY
from tests.datasets import make_category

pytestmark = pytest.mark.cluster

DATA, OUT = "s3://bucket/data sets/one", "s3a://bucket/runs/a"
MODELS = f"{OUT}/models/seed-0"
IMAGES = 800


@pytest.fixture(scope="module")
def metrics() -> str:
    """Choose the URL at which the cluster's node serves its metrics."""
    return f"http://127.0.0.1:{free_port()}/metrics"


@pytest.fixture(scope="module")
def cluster(s3: dict[str, str], metrics: str) -> Iterator[dict[str, str]]:
    """Start a cluster; yield the environment of a client, which has no credentials for S3, unlike the nodes."""
    token = secrets.token_hex(16)
    settings = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token, PATH=f"{BIN}:{os.environ['PATH']}")
    # Ray gives a job the address of the cluster that was started last with this folder: another test may start one.
    # Names of sockets must be short.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    output = Path(folder) / "output"

    def start() -> tuple[subprocess.Popen[bytes], str] | None:
        """Start a head, and wait for its dashboard; None if it ends: a port may be taken after it was found free."""
        dashboard = free_port()
        with output.open("wb") as file:
            process = subprocess.Popen(
                [
                    *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={free_port()}"),
                    *("--include-dashboard=true", f"--dashboard-port={dashboard}", "--node-ip-address=127.0.0.1"),
                    f"--metrics-export-port={re.search(r':([0-9]+)/', metrics)[1]}",  # type: ignore[index]
                    # An earlier test's cluster may still hold the default ports.
                    f"--dashboard-agent-listen-port={free_port()}",
                    f"--ray-client-server-port={free_port()}",
                    f"--temp-dir={folder}",
                ],
                env=settings | {"RAY_metrics_report_interval_ms": "500"},
                start_new_session=True,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        address = f"http://127.0.0.1:{dashboard}"

        def answers() -> bool:
            if process.poll() is not None:
                return True
            with contextlib.suppress(OSError):
                headers = {"Authorization": f"Bearer {token}"}
                return requests.get(f"{address}/api/version", headers=headers, timeout=5).ok
            return False

        wait_until(answers, "the dashboard did not start")
        return None if process.poll() is not None else (process, address)

    started = start() or start()
    assert started, f"the cluster did not start: {output.read_text()}"
    process, address = started
    without = {name: value for name, value in settings.items() if name not in s3}
    yield without | {"RAY_API_SERVER_ADDRESS": address}
    kill_tree(process)
    shutil.rmtree(folder, ignore_errors=True)


def ray_job(client: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    process = subprocess.run(
        [str(BIN / "ray"), "job", *arguments],
        env=client,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    print(process.stdout, process.stderr, sep="\n")
    assert "that-no-log-may-show" not in process.stdout + process.stderr
    return process


def submit(client: dict[str, str], job: str, *options: str) -> subprocess.CompletedProcess[str]:
    return ray_job(client, "submit", "--working-dir", ".", "--", "python", f"jobs/{job}.py", *options)


@contextlib.contextmanager
def count(metrics: str) -> Iterator[dict[str, float]]:
    """Poll the node's metrics during the block; yield the largest value of each, by name."""
    seen: dict[str, float] = {}
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(0.3):
            with contextlib.suppress(OSError):
                for line in requests.get(metrics, timeout=5).text.splitlines():
                    if match := re.match(r"(ray_stpm\w+)(?:{.*})? (\S+)$", line):
                        seen[match[1]] = max(seen.get(match[1], 0.0), float(match[2]))

    thread = threading.Thread(target=poll)
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


def test_a_submitted_benchmark_writes_to_s3(cluster: dict[str, str], s3: dict[str, str]) -> None:
    make_category(DATA, "nut")
    make_category(DATA, "grey", grey=True, kind="JPEG")
    recipe = ["--data", DATA, "--epochs", "2", "--checkpoint-seconds", "0", *TINY_RECIPE]
    process = submit(cluster, "benchmark", "--out", OUT, *recipe)
    assert process.returncode == 0
    assert "validation loss" in process.stdout
    report = json.loads(storage.read(f"{OUT}/report.json"))
    assert set(report["categories"]) == {"nut", "grey"}
    rows = open_rows(RunOutput.named(OUT, "seed-0")).to_table().to_pylist()
    assert sorted(row["uri"] for row in rows) == storage.files(f"{DATA}/grey/test") + storage.files(f"{DATA}/nut/test")
    assert all(storage.read(f"{OUT}/{row['heatmap']}").startswith(b"\x89PNG") for row in rows)
    assert not [uri for uri in storage.files(MODELS) if "checkpoint" in uri or ".train" in uri]
    written = b"".join(storage.read(uri) for uri in storage.files(OUT) if uri.endswith((".json", ".parquet")))
    for secret in (s3["AWS_ACCESS_KEY_ID"], s3["AWS_SECRET_ACCESS_KEY"]):
        assert secret.encode() not in written
    options = ["--models", MODELS, "--category", "nut"]
    for images, run in ((f"{DATA}/nut/test", "s3://nobucket/run"), ("s3://nobucket/images", f"{OUT}/other")):
        no_bucket = call_job("score", *options, "--images", images, "--out", run)
        assert no_bucket.returncode == 1
        (line,) = no_bucket.stderr.splitlines()
        assert "s3://nobucket/" in line


def test_a_stopped_job_is_continued_and_exports_what_the_dashboard_draws(cluster: dict[str, str], metrics: str) -> None:
    """Uses the model of the test before."""
    make_images("s3://bucket/images", IMAGES, broken=range(0, IMAGES, 100))
    out = "s3://bucket/stopped"
    options = ["--models", MODELS, "--images", "s3://bucket/images", "--category", "nut", "--out", out]
    options += ["--rows-per-file", "32", "--scoring-batch-size", "1", "--scorers", "1"]
    with count(metrics) as seen:
        command = ["submit", "--no-wait", "--submission-id", "night", "--working-dir", ".", "--"]
        assert ray_job(cluster, *command, "python", "jobs/score.py", *options).returncode == 0
        wait_until(lambda: bool(written_tasks(RunOutput.single(out))), "no rows were written")
        assert ray_job(cluster, "stop", "night").returncode == 0
        assert f"stopped by SIGTERM: {HOW_TO_CONTINUE}" in ray_job(cluster, "logs", "night").stdout
        assert "Job 'night' was stopped" in ray_job(cluster, "status", "night").stdout
        assert not storage.exists(f"{out}/_SUCCESS")
        again = submit(cluster, "score", *options)
    assert again.returncode == 0
    assert "are scored already" in again.stdout
    uris = [row["uri"] for row in read_rows(out, "uri")]
    assert len(uris) == len(set(uris)) == IMAGES
    drawn = set(re.findall(r"ray_stpm\w+", (REPOSITORY / "deploy" / "grafana.json").read_text()))
    assert drawn == {name for name, value in seen.items() if value > 0 and name.endswith("_total")}
