from __future__ import annotations

import datetime
from contextlib import suppress
from pathlib import Path

import pytest

from stpm import storage
from stpm.line.night import Night
from stpm.line.night_folder import NightFolder, remove_nights_before
from stpm.records import to_json
from stpm.scoring.inputs.manifest import write_manifest
from stpm.scoring.run_state import RunState, ScoringConfig
from stpm.scoring.run_statistics import RunResult
from tests.line.nightly_runs import cut_off_after

KEPT, OLD = datetime.date(2026, 11, 24), datetime.date(2026, 11, 1)


def make_night(out: str, date: datetime.date, runs: int = 2) -> NightFolder:
    """Write every kind of file that a night has."""
    folder = NightFolder.of(out, date)
    folder.write(Night(date.isoformat(), ("s3://dump",)))
    for number in range(1, runs + 1):
        output = folder.output(number)
        state = RunState(output.state_folder)
        state.start(ScoringConfig(("s3://dump",), 0.01))
        write_manifest([], output.manifest)
        for name in ("scores/{}_0.parquet", "heatmaps/{}/nut/0.png", "runs/{}/triage.html", "runs/{}/summaries/0"):
            storage.publish(f"{folder.uri}/{name.format(output.name)}", b"x", durable=False)
        state.finish(RunResult())
    return folder


def names(out: str) -> set[str]:
    return {uri.removeprefix(f"{out}/") for uri in storage.files(out)}


@pytest.fixture
def out(root: str) -> str:
    return f"{root}/out"


def test_an_old_night_is_removed_to_the_last_file(out: str) -> None:
    make_night(out, OLD)
    kept = make_night(out, KEPT)
    expected = set(storage.files(kept.uri))
    remove_nights_before(out, KEPT)
    assert set(storage.files(out)) == expected
    if storage.is_local(out):
        assert [path.name for path in Path(out).iterdir()] == ["date=2026-11-24"]


def test_what_no_run_wrote_stays(out: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever it is called, and however old the files are."""
    folder = make_night(out, OLD)
    mine = {
        f"date={OLD}/notes.txt",
        f"date={OLD}/scores/notes.csv",
        f"date={OLD}/runs/notes/run.json",
        f"date={OLD}/heatmaps/mine/0.png",
        "date=2026-01-01/scores/001_0.parquet",
        "date=2026-01-02/night.json",
        "date=2026-01-03/night.json",
        "date=20260101/night.json",
        "dump/2026-01-01/0.png",
    }
    if storage.is_local(out):
        # Another writer's unfinished file.
        mine.add(f"date={OLD}/.mine.part")
    for name in mine:
        storage.publish(f"{out}/{name}", b"mine", durable=False)
    # A folder that was renamed, or copied.
    storage.publish(f"{out}/date=2026-01-03/night.json", to_json(Night("2026-11-01", ())), durable=False)
    with caplog.at_level("INFO"):
        remove_nights_before(out, KEPT)
    assert names(out) == mine
    left = sum(name.startswith(f"date={OLD}/") for name in mine)
    assert f"removed the night 2026-11-01; {left} files that this job did not write remain" in caplog.messages
    assert storage.read(f"{folder.uri}/notes.txt") == b"mine"


def test_a_removal_that_was_cut_off_goes_on(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Waiting for the disk would take most of the time.
    monkeypatch.setattr("os.fsync", lambda handle: None)
    monkeypatch.setattr("os.sync", lambda: None)
    steps = 0
    while True:
        make_night(out, OLD)
        with cut_off_after(steps, monkeypatch), suppress(KeyboardInterrupt):
            remove_nights_before(out, KEPT)
            break
        remove_nights_before(out, KEPT)
        assert names(out) == set()
        steps += 1
    assert steps > 10
