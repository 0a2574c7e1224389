"""Scoring whose processes are killed at random moments, `STPM_TEST_KILLS` times each."""

import contextlib
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from PIL import Image
from ray.cluster_utils import Cluster

from stpm import storage
from stpm.cluster.device import KEEP_FREED_MEMORY
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import open_rows
from stpm.scoring.row_summary import RowSummary
from stpm.scoring.run_state import RunState
from stpm.scoring.run_statistics import RunResult, RunStatistics
from stpm.scoring.written_rows import committed_summaries
from tests.cluster.conftest import (
    DECODER,
    HANGS,
    KILLS,
    SCORER,
    children,
    environment,
    fit,
    kill_tree,
    make_images,
    read_rows,
    run_job,
    start_job,
    start_twice,
    wait_for_success,
    wait_until,
    written_tasks,
)
from tests.conftest import REPOSITORY
from tests.datasets import CRASHING_SITECUSTOMIZE, crashing_image, make_category

pytestmark = pytest.mark.cluster

# Every pair if kills are repeated, otherwise each victim and each store once.
VICTIMS = [(SCORER, "s3"), (DECODER, "local"), *([(SCORER, "local"), (DECODER, "s3")] if len(KILLS) > 1 else [])]
END_OF_DRIVER = {DECODER: kill_tree, SCORER: subprocess.Popen.kill}
IMAGES = 800
# With few rows per file and two segments, a kill finds some of them written, some half written and some not begun.
OPTIONS = ["--category", "nut", "--rows-per-file", "32", "--segment-rows", "500"]
OPTIONS += ["--scoring-batch-size", "4", "--max-error-rate", "1", "--backend", "pytorch"]
# Files that are written before a kill, at most: more are to come.
MAX_FILES = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fit a model, make a collection with every fiftieth file broken, and score it undisturbed."""
    root = tmp_path_factory.mktemp("run")
    make_category(str(root / "data"), "nut")
    fit(root / "data", root / "models")
    make_images(str(root / "images"), IMAGES, broken=range(0, IMAGES, 50))
    assert run_job("score", *arguments(root, root / "undisturbed")).returncode == 0
    return root


def arguments(root: Path, out: object) -> list[str]:
    return ["--models", str(root / "models"), "--images", str(root / "images"), "--out", str(out), *OPTIONS]


def rows_by_id(out: object) -> dict[int, dict[str, Any]]:
    rows = read_rows(out)
    assert len(rows) == IMAGES
    by_id = {row["image_id"]: row for row in rows}
    assert len(by_id) == IMAGES
    return by_id


def check_same(root: Path, out: str) -> None:
    """Check that a run has the same rows, heatmaps and files as the undisturbed one."""
    expected, found = rows_by_id(root / "undisturbed"), rows_by_id(out)
    assert expected.keys() == found.keys()
    for image_id, row in expected.items():
        other = found[image_id]
        for name in ("uri", "error_kind", "is_anomalous", "heatmap", "width", "bytes", "model_id"):
            assert row[name] == other[name], (row["uri"], name)
        if row["score"] is not None:
            assert other["score"] == pytest.approx(row["score"], rel=1e-5)
    for row in random.sample([row for row in expected.values() if row["heatmap"]], 40):
        pictures = []
        for folder in (str(root / "undisturbed"), out):
            with Image.open(pa.BufferReader(storage.read(f"{folder}/{row['heatmap']}"))) as image:
                pictures.append(np.asarray(image).astype(int))
        assert np.abs(pictures[0] - pictures[1]).max() <= 1
    names = {uri.removeprefix(f"{out}/").split("/")[0] for uri in storage.files(out)}
    assert names == {".lease", "_SUCCESS", "heatmaps", "manifest", "run.json", "scores", "summaries", "triage.html"}
    heatmaps = {uri.removeprefix(f"{out}/") for uri in storage.files(f"{out}/heatmaps")}
    assert heatmaps == {row["heatmap"] for row in expected.values()} - {""}
    assert summary(out) == summary(str(root / "undisturbed"))
    counted = RowSummary.total(committed_summaries(RunOutput.single(out)))
    assert counted == replace(RowSummary.of_rows(open_rows(RunOutput.single(out)).to_table(), ""), tasks=counted.tasks)


def summary(out: str) -> RunResult:
    """Return what run.json says of the rows."""
    return replace(RunState(out).result(), seconds=0.0, statistics=RunStatistics())


def count_files(out: str) -> int:
    """Count the files of rows that are written."""
    return len(written_tasks(RunOutput.single(out)))


def kill_one(driver: int, title: str) -> None:
    """Kill a process of the job, by its title, at a random one of its first 20 sightings."""
    sightings = random.randint(1, 20)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        found = children(driver, title)
        if len(found) >= sightings:
            with contextlib.suppress(psutil.NoSuchProcess):
                found[sightings - 1].kill()
                return
        sightings = max(1, sightings - len(found))
        time.sleep(0.01)
    pytest.fail(f"no process was {title}")


@pytest.fixture
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return a run folder that does not exist yet."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://bucket/{tmp_path.name}"
    return str(tmp_path / "out")


# Of a driver that is killed alone, the processes that it started go on for a moment.
@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize(("victim", "out"), VICTIMS, indirect=["out"])
def test_a_second_run_is_refused_and_after_kills_each_row_is_there_once(
    kill: int, victim: str, run: Path, out: str
) -> None:
    winner = start_twice(out, 1, "score", *arguments(run, out))
    files = random.randint(1, MAX_FILES)
    wait_until(lambda: count_files(out) >= files, "no rows were written")
    time.sleep(random.uniform(0, 0.5))
    END_OF_DRIVER[victim](winner)
    assert not storage.exists(f"{out}/_SUCCESS")
    process = start_job("score", *arguments(run, out))
    wait_until(lambda: bool(children(process.pid, f"ray::{victim}")), f"no process was {victim}")
    before = count_files(out)
    if victim == SCORER:
        scorers = children(process.pid, f"ray::{victim}")
        assert all(KEEP_FREED_MEMORY["env_vars"].items() <= scorer.environ().items() for scorer in scorers)
        wait_until(lambda: count_files(out) != before, "no rows were written")
    kill_one(process.pid, f"ray::{victim}")
    log = wait_for_success(process)
    winner.communicate()
    assert "is held by" not in log
    assert "are scored already" in log
    check_same(run, out)


# A job whose lease is watched for a shorter time, and never asked for its process, as on another machine.
WATCHED = """
import runpy, sys
from stpm import lease
lease._machine = lambda: ""
lease._RENEWAL, lease.TIMEOUT, lease._MARGIN = 0.5, 30.0, 10.0
if sys.argv.pop(1) == "asleep":
    lease._watch = lambda *_: None
sys.argv[0] = "jobs/score.py"
runpy.run_path("jobs/score.py", run_name="__main__")
"""
# In the processes of a cluster: tasks do not ask for the lease, as if they had been suspended after they did. The
# third task of the first run, or a later one, is held until the file `awake` exists: however late the driver stops,
# one is left.
UNCHECKED = """
import itertools, pathlib, time
from stpm import lease
folder, calls = pathlib.Path(__file__).parent, itertools.count()
def check(fence):
    # A task asks twice: before it writes its rows, and after.
    if next(calls) % 2:
        (folder / f"written-{time.monotonic_ns()}").touch()
    elif fence.number == 0 and len(list(folder.glob("written-*"))) > 1 and not (folder / "held").exists():
        (folder / "held").touch()
        while not (folder / "awake").exists():
            time.sleep(0.1)
lease.check = check
"""


def start_watched(client: dict[str, str], mode: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WATCHED, mode, *options, "--scorers", "1"]
    return subprocess.Popen(command, env=environment(**client), cwd=REPOSITORY, stdout=-1, stderr=-1, text=True)


def row_files(out: str, attempt: int) -> set[str]:
    return set(storage.glob(f"{out}/scores/scores_{attempt:06}_*")[0])


@pytest.mark.parametrize(("mode", "out"), [("awake", "local"), ("asleep", "s3")], indirect=["out"])
def test_a_driver_that_was_suspended_while_another_took_over_adds_no_row(
    mode: str, out: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cluster lives on, so that its queued tasks run. Asleep, neither it nor its tasks notice the loss."""
    options = [*arguments(run, out), "--mounted", str(tmp_path), "--mounted", str(run)]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    if mode == "asleep":
        (tmp_path / "sitecustomize.py").write_text(UNCHECKED)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPOSITORY}")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 5})
    client = {"RAY_ADDRESS": cluster.address, "PYTHONPATH": str(REPOSITORY)}
    suspended = start_watched(client, mode, *options)
    try:
        wait_until(lambda: len(row_files(out, 0)) > 1, "no rows were written")
        suspended.send_signal(signal.SIGSTOP)
        second = start_watched(client, "awake", *options)
        wait_until(lambda: bool(row_files(out, 1)), "the second run wrote no rows")
        accepted = row_files(out, 0)
        suspended.send_signal(signal.SIGCONT)
        if mode == "asleep":
            (tmp_path / "awake").touch()
            wait_until(lambda: bool(row_files(out, 0) - accepted), "no task of the suspended driver ran")
        assert "are scored already" in wait_for_success(second)
        error = suspended.communicate(timeout=HANGS)[1]
        assert suspended.returncode == 2, error
        assert "this run has stopped" in error
        if mode == "asleep":
            # The tasks wrote after the end of the second run, too: the same command removes that.
            wait_for_success(start_watched(client, "awake", *options))
        assert row_files(out, 0) == accepted
        check_same(run, out)
    finally:
        suspended.kill()
        print(*suspended.communicate())
        cluster.shutdown()


def test_an_image_that_crashes_the_decoder_becomes_a_row(run: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(CRASHING_SITECUSTOMIZE)
    images, out = tmp_path / "images", tmp_path / "out"
    make_images(str(images), 5)
    storage.publish(f"{images}/crash.png", crashing_image())
    options = ["--models", str(run / "models"), "--images", str(images), "--category", "nut", "--out", str(out)]
    options += ["--scorers", "1", "--max-error-rate", "1"]
    assert run_job("score", *options, PYTHONPATH=f"{tmp_path}:{REPOSITORY}").returncode == 0
    errors = {Path(row["uri"]).name: row["error_message"] for row in read_rows(out) if row["error_kind"]}
    assert errors == {"crash.png": "decoding it crashes the process with SIGSEGV; repair or remove the file"}
    assert len(read_rows(out)) == 6
