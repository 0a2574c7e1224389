"""Command lines of the benchmarks, and jobs that they start, watch and kill."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
CORES = psutil.cpu_count(logical=False) or 1

_SAMPLE_SECONDS = 0.2
# Reading a process's memory is slow.
_SAMPLES_PER_MEMORY = 15


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help shows a module's docstring as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def words(text: str) -> list[str]:
    """Split the value of an option at its commas."""
    return [word for word in text.split(",") if word]


def integers(text: str) -> list[int]:
    """Split the value of an option at its commas into integers."""
    return [int(word) for word in words(text)]


def options_from(values: Mapping[str, object]) -> list[str]:
    """Return `--name value` words for a command line."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def job_command(name: str, options: Mapping[str, object]) -> list[str]:
    """Return the command line of one of the jobs, to be run in ROOT."""
    return [sys.executable, f"jobs/{name}.py", *options_from(options)]


def run_job(name: str, options: Mapping[str, object]) -> None:
    """Run a job to its end. Exit if it fails."""
    ran = subprocess.run(job_command(name, options), cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(f"{name} ended with {ran.returncode}:\n{ran.stdout}{ran.stderr}")


def kill_after(
    name: str, options: Mapping[str, object], seconds: float, condition: Callable[[], bool] = lambda: True
) -> bool:
    """Start a job, and kill it and all its processes `seconds` after `condition()` is true, as when a machine fails.

    Returns:
        False if the job ended before that.
    """
    with subprocess.Popen(
        job_command(name, options), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as job:
        while job.poll() is None and not condition():
            time.sleep(1)
        time.sleep(seconds)
        if job.poll() is not None:
            return False
        for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    return True


class ProcessTree(threading.Thread):
    """Watch a job, and all other descendants of this process, such as the nodes of a cluster, until the job ends.

    A shared page counts in equal parts for the processes that share it.

    Attributes:
        cpu_seconds: of all of them meanwhile.
        peak: largest sum of their memory, bytes.
        peaks: the same of each part of the job. `driver` is the process that was started, `ray` are Ray's own.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._driver = psutil.Process(pid)
        # Nodes may have used CPU time before the job began.
        others = [process for process in psutil.Process().children(recursive=True) if process != self._driver]
        self._before = {process: sum(process.cpu_times()[:2]) for process in others}
        self._cpu_seconds: dict[psutil.Process, float] = {}
        self.peak = 0
        self.peaks = dict.fromkeys(("driver", "scorers", "stages", "ray"), 0)

    @property
    def cpu_seconds(self) -> float:
        return sum(self._cpu_seconds.values())

    def run(self) -> None:
        for number in itertools.count():
            sizes = dict.fromkeys(self.peaks, 0)
            try:
                if self._driver.status() == psutil.STATUS_ZOMBIE:
                    return
                family = psutil.Process().children(recursive=True)
            except psutil.NoSuchProcess:
                return
            for process in family:
                with contextlib.suppress(psutil.Error):
                    self._cpu_seconds[process] = sum(process.cpu_times()[:2]) - self._before.get(process, 0.0)
                    if number % _SAMPLES_PER_MEMORY == 0:
                        sizes[self._part(process)] += process.memory_full_info().pss
            self.peak = max(self.peak, sum(sizes.values()))
            self.peaks = {part: max(peak, sizes[part]) for part, peak in self.peaks.items()}
            time.sleep(_SAMPLE_SECONDS)

    def _part(self, process: psutil.Process) -> str:
        """Return the part of the job that a process belongs to, by the title that Ray gives the process."""
        if process == self._driver:
            return "driver"
        title = " ".join(process.cmdline()[:2])
        if "MapWorker" in title:
            return "scorers"
        # Between two tasks a worker is IDLE; other titles that begin with `ray::` are Ray's own actors and agents.
        return "stages" if title.startswith(("ray::Read", "ray::Map", "ray::IDLE")) else "ray"


def time_command(command: list[str], until: str = "") -> dict[str, float]:
    """Run a command; return its wall `seconds`, and the `cpu_seconds` and `peak_mib` of its process tree.

    The peaks of a job's parts are `driver_mib` and so on. Take all of them when the command prints the line `until`, or
    at its end if that is empty. Exit if the command fails.
    """
    start = time.perf_counter()
    cost: dict[str, float] = {}
    tail: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        tree = ProcessTree(process.pid)
        tree.start()

        def measure() -> dict[str, float]:
            sizes = {"peak": tree.peak, **tree.peaks}
            seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": tree.cpu_seconds}
            return seconds | {f"{part}_mib": round(size / 2**20) for part, size in sizes.items()}

        assert process.stdout
        for line in process.stdout:
            tail = [*tail[-30:], line]
            if until and line.strip() == until:
                cost = measure()
    if process.returncode or (until and not cost):
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(tail)}")
    return cost or measure()
