"""Real jobs in real processes, and a real S3 server."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
import requests
from moto.server import ThreadedMotoServer

from stpm import storage
from stpm.scoring.output import RunOutput
from tests.conftest import REPOSITORY

# What keeps a whole job at seconds; the machinery is the same as for a real recipe.
TINY_RECIPE = [
    "--preset",
    "paper",
    "--teacher",
    "test_resnet",
    "--teacher-weights",
    "random",
    "--size",
    "64",
    "--batch",
    "4",
]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(**extra: str) -> dict[str, str]:
    """The environment without anything that would lead a job to another cluster."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "STPM_"))}
    return kept | extra


def start_job(name: str, *options: str, **extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "jobs" / f"{name}.py"), *options],
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_job(name: str, *options: str, **extra: str) -> subprocess.CompletedProcess[str]:
    process = start_job(name, *options, **extra)
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        # It would take the cores of all tests to come.
        process.kill()
        raise
    print(out, err, sep="\n")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_until(true: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Fails with what is the matter if it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def committed(out: str) -> list[str]:
    """The files that say which rows of an unfinished pass are written for good: each comes after its rows."""
    files = [uri for uri, _ in storage.files(RunOutput.single(out).checkpoint)]
    # In a store the folder itself may be an object.
    return [uri for uri in files if uri.endswith(".parquet") and not uri.endswith(".pending.parquet")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """A cluster that a test is done with: the process that it was started by, and all that this one started."""
    for member in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            member.kill()
    process.wait(60)


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """The environment in which s3:// means a server of our own, with an empty bucket named `bucket`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "a-key-that-no-log-may-show",
        "AWS_SECRET_ACCESS_KEY": "a-secret-that-no-log-may-show",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        # fsspec keeps filesystems by their arguments, and the endpoint comes from the environment.
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        # What the server holds belongs to the process, and outlives a server.
        requests.post(f"http://{host}:{port}/moto-api/reset", timeout=10).raise_for_status()
        storage.filesystem("s3://bucket")[0].mkdir("bucket")
        yield settings
    server.stop()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path
