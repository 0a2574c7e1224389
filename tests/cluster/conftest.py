"""Jobs in processes of their own, a server of S3, and helpers that several of these tests need."""

import contextlib
import dataclasses
import io
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import psutil
import pytest
import requests
from moto.server import ThreadedMotoServer

from stpm import cli, storage
from stpm.cluster.connection import connected
from stpm.commands import COMMANDS
from stpm.errors import RunDamagedError
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import open_rows
from stpm.scoring.written_rows import committed_summaries
from tests.conftest import REPOSITORY, TINY, fit_model
from tests.datasets import encode_image

# A recipe that fits in seconds.
TINY_RECIPE = ["--preset", "paper", "--teacher", "test_resnet", "--teacher-weights", "random", "--size", "64"]
TINY_RECIPE += ["--batch-size", "4"]

BIN = Path(sys.executable).parent
# Seconds after which a job hangs: the longest takes two minutes, on a machine that does nothing else.
HANGS = 1200
# Titles that Ray gives to its processes.
SCORER, DECODER, FIT_WORKER = "MapWorker(MapBatches(Scorer))", "MapBatches(Decode", "TrainWorker"
# How often the tests that kill processes at random moments are repeated.
KILLS = range(int(os.environ.get("STPM_TEST_KILLS", "1")))


def environment(**extra: str) -> dict[str, str]:
    """Return the environment without what would lead a job to another cluster, and with `extra`."""
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
    return wait_for(start_job(name, *options, **extra))


def start_twice(out: object, seconds: float, name: str, *options: str, **extra: str) -> subprocess.Popen[str]:
    """Start a job two times, so many seconds apart; check that one is refused and names the other, and return that."""
    first = start_job(name, *options, **extra)
    time.sleep(seconds)
    rivals = [first, start_job(name, *options, **extra)]
    wait_until(lambda: any(each.poll() is not None for each in rivals), "neither was refused")
    winner, loser = sorted(rivals, key=lambda each: each.poll() is not None)
    assert loser.returncode == 1
    assert f"{out} is held by process {winner.pid} on " in loser.communicate()[1]
    return winner


def wait_for(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for the end of a job, and show what it printed."""
    try:
        out, err = process.communicate(timeout=HANGS)
    except subprocess.TimeoutExpired:
        # Otherwise it would go on beside the next tests.
        process.kill()
        raise
    print(out, err, sep="\n")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for_success(process: subprocess.Popen[str]) -> str:
    """Wait for the end of a job, check that it succeeded, and return its standard output."""
    ran = wait_for(process)
    assert ran.returncode == 0
    return ran.stdout


def call_job(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a job as `run_job` does, but in this process, which has imported everything: seconds less.

    It uses this process's connection to Ray, if there is one. What other processes print is not returned.
    """
    out, err = io.StringIO(), io.StringIO()
    package = logging.getLogger("stpm")
    handlers, on_signal = package.handlers, {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        cli.run_job(COMMANDS[name], options)
    package.handlers = handlers
    for each, handler in on_signal.items():
        signal.signal(each, handler)
    print(out.getvalue(), err.getvalue(), sep="\n")
    assert isinstance(ended.value.code, int)
    return subprocess.CompletedProcess([name, *options], ended.value.code, out.getvalue(), err.getvalue())


def fit(data: object, models: object, category: str = "nut", **changes: Any) -> None:
    """Fit a tiny model of one category, for one epoch, in this process: the fit job would start Ray for it."""
    fit_model(data, models, category, dataclasses.replace(TINY, epochs=1, **changes))


def make_images(folder: str, count: int, broken: Sequence[int] = ()) -> None:
    """Write images of random noise, with a patch of varying brightness; those numbered in `broken` are cut off."""
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(90, 130, (48, 40, 3), dtype=np.uint8)
        pixels[: i % 40, :20] += 60
        kind, suffix = ("JPEG", "jpg") if i % 2 else ("PNG", "png")
        data = encode_image(pixels, kind)
        storage.publish(f"{folder}/{i:04}.{suffix}", data[:40] if i in broken else data, durable=False)


def read_rows(out: object, *columns: str) -> list[dict[str, Any]]:
    """Read the rows of a scored collection."""
    dataset = open_rows(RunOutput.single(storage.absolute(str(out))))
    rows: list[dict[str, Any]] = dataset.to_table(columns=list(columns) or None).to_pylist()
    return rows


def written_tasks(run: RunOutput) -> list[str]:
    """Name the tasks whose rows no later run scores again."""
    while True:
        # The run may add its summaries up meanwhile.
        with contextlib.suppress(RunDamagedError):
            return [task for summary in committed_summaries(run) for task in summary.tasks]


def wait_until(condition: Callable[[], bool], failure: str, seconds: float = 300) -> None:
    """Wait until a condition is true; fail with this message if it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(0.1)


def children(pid: int, title: str) -> list[psutil.Process]:
    """List the processes below a process that have `title` in their title, which Ray sets while they run."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if title in " ".join(child.cmdline()):
                found.append(child)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all processes below it, as when a machine fails."""
    for member in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            member.kill()
    process.communicate(timeout=60)


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """Start a server of S3 with an empty bucket named `bucket`; yield the environment in which s3:// means it."""
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
        # fsspec caches filesystems by their arguments, and the endpoint is in the environment instead.
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        # The content belongs to this process, and would outlive an earlier server.
        requests.post(f"http://{host}:{port}/moto-api/reset", timeout=10).raise_for_status()
        storage.filesystem("s3://bucket")[0].mkdir("bucket")
        yield settings
    # The next test that opens s3:// would wait for this server.
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


@contextlib.contextmanager
def own_ray() -> Iterator[None]:
    """Connect this process to a Ray of its own, which the jobs of `call_job` share."""
    with pytest.MonkeyPatch.context() as patch:
        # As for the clusters of other tests: Ray reads it once in a process.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected():
            yield


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    with own_ray():
        yield


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty folder the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
