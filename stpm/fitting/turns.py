"""Fits that share a machine's cores compute in turns.

The threads of OpenMP wait for each other by spinning. Where two processes have as many threads as there are cores, each
spins while the other has the core that it waits for: two fits at once took five times as long as one. In turns they
take twice as long, and each has the same threads, and so the same bits, as alone.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from stpm.cluster.cpus import usable_cpus

# Of a turn, at least; a step of a fit is not interrupted.
_SECONDS = 0.2
# For a turn. A process that is suspended, or waits for something else, does not give its turn back.
_PATIENCE_SECONDS = 60.0
# Who has waited in vain computes for so many times as long before it waits again.
_PAUSES = 10
_POLL_SECONDS = 0.002

log = logging.getLogger(__name__)


class _Turns:
    """Turns of one fit, which computes in so many threads. After a long wait it goes on without."""

    def __init__(self, folder: Path, threads: int) -> None:
        cores = sorted(os.sched_getaffinity(0))[: usable_cpus()]
        slots = [cores[start : start + threads] for start in range(0, max(len(cores) - threads, 0) + 1, threads)]
        self._slots = [[FileLock(folder / f"core-{core}") for core in slot] for slot in slots]
        # Whoever waits has it, so that who gives a turn back does not take the next one at once.
        self._gate = FileLock(folder / "next")
        self._held: list[FileLock] = []
        self._next = 0.0

    def take(self) -> None:
        if time.monotonic() < self._next:
            return
        seconds = _SECONDS
        try:
            if not (self._held and self._nobody_waits()):
                self.give_back()
                with self._gate.acquire(_PATIENCE_SECONDS, poll_interval=_POLL_SECONDS):
                    self._wait_for_slot()
        # Turns save time and decide nothing: a folder that cannot be written to, or a turn that does not come.
        except OSError as error:
            seconds = _PAUSES * _PATIENCE_SECONDS
            log.info("this fit computes beside others for %g s: %s", seconds, error)
        self._next = time.monotonic() + seconds

    def _nobody_waits(self) -> bool:
        try:
            with self._gate.acquire(0):
                return True
        except Timeout:
            return False

    def _wait_for_slot(self) -> None:
        latest = time.monotonic() + _PATIENCE_SECONDS
        while not any(map(self._try, self._slots)):
            if time.monotonic() >= latest:
                raise Timeout(self._slots[0][0].lock_file)
            time.sleep(_POLL_SECONDS)

    def _try(self, slot: list[FileLock]) -> bool:
        try:
            for lock in slot:
                lock.acquire(0)
                self._held.append(lock)
        except Timeout:
            self.give_back()
            return False
        return True

    def give_back(self) -> None:
        while self._held:
            self._held.pop().release()


class _Current(threading.local):
    turns: _Turns | None = None


_current = _Current()


@contextmanager
def in_turns(device: torch.device) -> Iterator[None]:
    """Compute in turns with fits in other processes of this user, if on a CPU in several threads; see `take_turn`."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads < 2:
        yield
        return
    folder = Path(tempfile.gettempdir()) / f"stpm-turns-{os.getuid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
    _current.turns = turns = _Turns(folder, threads)
    try:
        yield
    finally:
        _current.turns = None
        turns.give_back()


def take_turn() -> None:
    """Wait for a turn, unless this fit's has just begun; call it before each step of a fit that computes."""
    if _current.turns:
        _current.turns.take()
