"""A pass whose processes are killed for real, at random moments; how often, `STPM_TEST_KILLS` says."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from PIL import Image

from stpm import storage
from tests.cluster.conftest import TINY_RECIPE, committed, run_job, start_job, wait_until
from tests.datasets import encoded, make_category

pytestmark = pytest.mark.cluster

KILLS = range(int(os.environ.get("STPM_TEST_KILLS", "1")))
SCORER, DECODER = "MapWorker(MapBatches(ScorerActor))", "MapBatches(Decode"
# Every pair where kills are repeated; else each victim and each store once.
VICTIMS = [(SCORER, "s3"), (DECODER, "local"), *([(SCORER, "local"), (DECODER, "s3")] if len(KILLS) > 1 else [])]
IMAGES = 1000
# Files of few rows: so that a kill finds some that are written, some half written and some that are not.
OPTIONS = ["--category", "nut", "--rows-per-file", "32", "--scoring-batch-size", "4", "--max-error-rate", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a collection with every fiftieth file broken, and an undisturbed pass over it."""
    root = tmp_path_factory.mktemp("run")
    make_category(str(root / "data"), "nut")
    fit = ["--data", str(root / "data"), "--models", str(root / "models"), "--epochs", "1", *TINY_RECIPE]
    assert run_job("fit", *fit).returncode == 0
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    for i in range(IMAGES):
        pixels = rng.integers(90, 130, (48, 40, 3), dtype=np.uint8)
        pixels[: i % 40, :20] += 60
        data = encoded(pixels, "JPEG" if i % 2 else "PNG")
        (root / "images" / f"{i:04}.{'jpg' if i % 2 else 'png'}").write_bytes(data[:40] if i % 50 == 0 else data)
    process = score(root, root / "undisturbed")
    assert process.returncode == 0
    return root


def arguments(root: Path, out: object) -> list[str]:
    return ["--models", str(root / "models"), "--images", str(root / "images"), "--out", str(out), *OPTIONS]


def score(root: Path, out: object) -> object:
    return run_job("score", *arguments(root, out))


def rows_of(out: str) -> dict[int, dict[str, object]]:
    filesystem, path = storage.arrow_filesystem(f"{out}/scores")
    rows = ds.dataset(path, filesystem=filesystem, format="parquet").to_table().to_pylist()
    assert len(rows) == IMAGES
    by_id = {row["image_id"]: row for row in rows}
    assert len(by_id) == IMAGES
    return by_id


def check_same(root: Path, out: str) -> None:
    """The pass ended as the undisturbed one did."""
    expected, found = rows_of(str(root / "undisturbed")), rows_of(out)
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
    names = {uri.removeprefix(f"{out}/").split("/")[0] for uri, _ in storage.files(out)}
    assert names == {".lease", "_SUCCESS", "heatmaps", "manifest", "run.json", "scores", "triage.html"}


def wait_for_rows(out: str, at_least: int) -> None:
    """Until some files of rows are there for good."""
    wait_until(lambda: len(committed(out)) >= at_least, "no rows were committed", seconds=300)


def kill_one(driver: int, title: str, sighting: int) -> None:
    """A process of the job, by the title that Ray gives it while it runs, once it was seen so often."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for child in psutil.Process(driver).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if title in " ".join(child.cmdline()):
                    sighting -= 1
                    if not sighting:
                        child.send_signal(signal.SIGKILL)
                        return
        time.sleep(0.01)
    pytest.fail(f"no process was {title}")


@pytest.fixture
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run folder that is not yet there."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://bucket/{tmp_path.name}"
    return str(tmp_path / "out")


@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize(("victim", "out"), VICTIMS, indirect=["out"])
def test_a_killed_scorer_or_decoder_costs_time_alone(kill: int, victim: str, run: Path, out: str) -> None:
    process = start_job("score", *arguments(run, out))
    # Decoding runs ahead of all else, and has ended before most rows are there.
    wait_for_rows(out, random.randint(1, 6) if victim == SCORER else 0)
    kill_one(process.pid, f"ray::{victim}", sighting=random.randint(1, 20))
    stdout, stderr = process.communicate(timeout=400)
    print(stdout, stderr)
    assert process.returncode == 0
    check_same(run, out)


def kill_all(driver: int) -> None:
    """As a machine that fails: the driver, and all that it started."""
    others = psutil.Process(driver).children(recursive=True)
    psutil.Process(driver).kill()
    for other in others:
        if other.is_running():
            other.kill()


@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize("out", [pytest.param("local", marks=pytest.mark.faults), "s3"], indirect=True)
def test_a_killed_driver_is_taken_up_by_the_next_run(kill: int, run: Path, out: str) -> None:
    process = start_job("score", *arguments(run, out))
    wait_for_rows(out, random.randint(1, 8))
    time.sleep(random.uniform(0, 0.5))
    kill_all(process.pid)
    process.communicate(timeout=60)
    assert not storage.exists(f"{out}/_SUCCESS")
    again = score(run, out)
    assert again.returncode == 0
    assert "are scored already" in again.stdout
    check_same(run, out)


def test_one_run_at_a_time_writes_and_a_dead_ones_place_is_taken_at_once(run: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    first = start_job("score", *arguments(run, out))
    time.sleep(1)
    rivals = [first, start_job("score", *arguments(run, out))]
    wait_until(lambda: any(each.poll() is not None for each in rivals), "both went on")
    winner, loser = sorted(rivals, key=lambda each: each.poll() is not None)
    assert loser.returncode == 1
    assert f"{out} is held by process {winner.pid} on " in loser.communicate()[1]

    # The driver alone is killed: what it had started goes on for a moment.
    wait_for_rows(out, 1)
    winner.kill()
    again = score(run, out)
    winner.communicate()
    assert again.returncode == 0
    assert "is held by" not in again.stdout
    assert "are scored already" in again.stdout
    check_same(run, out)
