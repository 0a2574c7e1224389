"""What Ray raises becomes one line, with what to do."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from stpm import __version__, storage
from stpm.cluster.ray_failures import interrupted_by_ray
from stpm.errors import HOW_TO_CONTINUE, RunInterruptedError


def test_a_full_disk_is_one_line_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uri = str(tmp_path / "scores" / "0.parquet")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: '.*/scores/0.parquet'") as found:
        storage.publish(uri, b"rows")
    with pytest.raises(RunInterruptedError) as interrupted, interrupted_by_ray("scoring"):
        raise RayTaskError(
            "write", f"Traceback (most recent call last):\n  300 lines\nOSError: {found.value}", found.value
        )
    assert str(interrupted.value) == (
        f"scoring was interrupted: OSError: [Errno 28] No space left on device: '{uri}'; make room on that disk; "
        f"{HOW_TO_CONTINUE}"
    )
    assert not caplog.records
    # Any other failure may be a fault of Ray, or of ours.
    with pytest.raises(RunInterruptedError, match=f"lost; {HOW_TO_CONTINUE}$"), interrupted_by_ray("scoring"):
        raise RayTaskError("write", "Traceback\n  ...\nOSError: lost", OSError("lost"))
    assert [record.message for record in caplog.records if record.exc_info] == ["Ray failed"]


def test_a_signal_that_also_ends_rays_processes_ends_the_job_without_a_traceback() -> None:
    """As `timeout` and a terminal do, which send it to all processes of a group."""
    program = """
import signal
from ray.exceptions import ActorDiedError
from stpm.cli import Job, run_job
from stpm.cluster.ray_failures import interrupted_by_ray
def stop():
    with interrupted_by_ray("fitting"):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise ActorDiedError()
run_job(Job("x", "", {}, "__main__:stop", ""), [])
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (128 + signal.SIGTERM, "")
    assert ran.stdout.splitlines() == [f"x of stpm {__version__} starts", f"stopped by SIGTERM: {HOW_TO_CONTINUE}"]


def test_a_signal_while_ray_starts_ends_the_job_as_any_other() -> None:
    """Ray's own handler, which raises SystemExit, is in force until it has started."""
    program = """
import signal
from stpm.cli import Job, run_job
from stpm.cluster import connection
def start(**options):
    from ray._private.utils import set_sigterm_handler
    set_sigterm_handler(lambda number, frame: exit(number))
    signal.raise_signal(signal.SIGTERM)
connection.ray.init = start
def run():
    with connection.connected():
        pass
run_job(Job("x", "", {}, "__main__:run", ""), [])
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (128 + signal.SIGTERM, "")
    assert ran.stdout.splitlines()[-1] == f"stopped by SIGTERM: {HOW_TO_CONTINUE}"
