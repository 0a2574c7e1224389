"""Turns of real processes, which are stopped and killed."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Writes when it begins and ends to compute, with all cores, until it is killed.
SCRIPT = """
import sys, time, torch
from stpm.fitting import turns
turns._PATIENCE_SECONDS = float(sys.argv[2])
torch.set_num_threads(max(turns.usable_cpus(), 2))
with turns.in_turns(torch.device("cpu")), open(sys.argv[1], "w") as file:
    while True:
        turns.take_turn()
        start = time.monotonic()
        time.sleep(0.02)
        print(start, time.monotonic(), file=file, flush=True)
"""

Start = Callable[[str, float], subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    processes = []

    def start(name: str, patience: float) -> subprocess.Popen[bytes]:
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / name), str(patience)]
        processes.append(subprocess.Popen(command, env=environment))
        return processes[-1]

    yield start
    for each in processes:
        each.kill()
        each.wait()


def steps(file: Path) -> list[tuple[float, float]]:
    lines = file.read_text().splitlines()[:-1] if file.exists() else []
    return [(float(begin), float(end)) for begin, end in map(str.split, lines)]


def wait_for_steps(file: Path, count: int) -> None:
    """Wait until so many more steps are written."""
    wanted, latest = len(steps(file)) + count, time.monotonic() + 60
    while len(steps(file)) < wanted:
        assert time.monotonic() < latest
        time.sleep(0.05)


def test_processes_compute_in_turns_and_go_on_after_one_that_is_killed(tmp_path: Path, start: Start) -> None:
    files = {name: tmp_path / name for name in "abc"}
    processes = {name: start(name, 600.0) for name in files}
    for file in files.values():
        wait_for_steps(file, 1)
    for file in files.values():
        wait_for_steps(file, 30)
    done = sorted((*step, name) for name, file in files.items() for step in steps(file))
    for (_, end, _), (begin, _, _) in itertools.pairwise(done):
        assert end <= begin
    # More than one step in a turn.
    changes = sum(one[2] != other[2] for one, other in itertools.pairwise(done))
    assert changes < len(done) / 3
    for killed in "ab":
        processes[killed].kill()
        wait_for_steps(files["c"], 20)


def test_a_folder_that_cannot_be_used_stops_no_fit(tmp_path: Path, start: Start) -> None:
    (tmp_path / f"stpm-turns-{os.getuid()}").write_text("a file")
    start("a", 60.0)
    wait_for_steps(tmp_path / "a", 30)


def test_a_process_that_is_stopped_does_not_stop_others_for_good(tmp_path: Path, start: Start) -> None:
    first = start("a", 0.5)
    wait_for_steps(tmp_path / "a", 1)
    first.send_signal(signal.SIGSTOP)
    start("b", 0.5)
    wait_for_steps(tmp_path / "b", 50)
    first.send_signal(signal.SIGCONT)
    wait_for_steps(tmp_path / "a", 30)
    # Both take turns again, when the second one has tried again.
    time.sleep(10 * 0.5 + 1)
    begun = time.monotonic()
    for name in "ab":
        wait_for_steps(tmp_path / name, 30)
    done = sorted(step for name in "ab" for step in steps(tmp_path / name) if step[0] > begun)
    overlaps = sum(begin < end for (_, end), (begin, _) in itertools.pairwise(done))
    assert overlaps < len(done) / 10
