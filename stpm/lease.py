"""A lease on a folder: one run at a time writes there, on a local disk or in an object store.

<folder>/.lease/<n>.json says who holds it; the highest n counts. A file is made by exclusive creation alone, so of
two runs that want n + 1 one gets it. The holder writes its own file anew every few seconds. Others watch that file:
while it changes, its holder is alive; when it has stood still for `TIMEOUT`, they take over. No two machines' clocks
are compared. A holder that could not write for nearly as long stops by itself, before anybody may take over.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from stpm import storage
from stpm.console import SOME_FAILED, duration
from stpm.errors import ConfigError, CutOffError

log = logging.getLogger(__name__)

# Seconds. Storage that is away for less than a minute stops nobody: whoever writes has as much patience.
TIMEOUT = 90.0
_RENEWAL = 10.0
_POLL = 2.0
# A holder that could not renew its lease stops so long before others may take over, and its process ends halfway there.
_MARGIN = 20.0
# What a driver has started on its cluster ends within seconds of it.
_AFTERMATH = 5.0

_FOLDER = ".lease"


def _clock() -> float:
    """Seconds that also pass while the machine sleeps, where it can tell."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@dataclass(frozen=True)
class Holder:
    """A process that holds a lease, as its file says.

    Args:
        token: of this one acquisition.
        host: its name, for people.
        machine: boot and process namespace that `pid` and `born` are of; "" where the system does not tell.
        pid: of the process.
        born: when the process started, as its system counts.
        command: that it runs.
        since: when it took the lease, for people.
        beat: counts the renewals.
        released: it has ended.
    """

    token: str = ""
    host: str = ""
    machine: str = ""
    pid: int = 0
    born: str = ""
    command: str = ""
    since: str = ""
    beat: int = 0
    released: bool = False

    @classmethod
    def this_process(cls) -> Holder:
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            born=_born(os.getpid()),
            command=shlex.join(sys.argv),
            since=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    @classmethod
    def parse(cls, data: bytes) -> Holder:
        """What a lease's file says; a holder without a name where that is nothing, as when a file was just made."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return cls()

    def encode(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False).encode()

    def lives_here(self) -> bool | None:
        """Whether the process runs, if it is one of this machine's; None if that cannot be known."""
        if not self.machine or self.machine != _machine():
            return None
        return bool(self.born) and _born(self.pid) == self.born

    def __str__(self) -> str:
        if not self.token:
            return "a run that has not said which"
        return f"process {self.pid} on {self.host}, since {self.since}: {self.command}"


class Lease:
    """The lease on a folder, for one acquisition.

    Args:
        folder: a URI.
        holder: who wants it.
        clock: seconds.
        sleep: waits for so many.
    """

    def __init__(
        self,
        folder: str,
        holder: Holder,
        clock: Callable[[], float] = _clock,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.folder = folder
        self._holder = holder
        self._clock = clock
        self._sleep = sleep
        self._number = -1
        self._renewed = 0.0
        self._failure = ""
        self._lost = ""

    def acquire(self, wait: bool) -> None:
        """Take the lease: at once if nobody holds it or its holder is dead, else when its holder turns out to be.

        Args:
            wait: for a holder that lives, to its end.

        Raises:
            ConfigError: if its holder lives, and is not to be waited for.
        """
        seen: tuple[int, bytes] | None = None
        since = self._clock()
        told = False
        while True:
            found = number, data = self._latest()
            holder = Holder.parse(data)
            lives = holder.lives_here()
            stood_still = found == seen and self._clock() - since >= TIMEOUT
            if number < 0 or holder.released or lives is False or (stood_still and lives is None):
                if self._claim(number + 1):
                    if lives is False and not holder.released:
                        self._sleep(_AFTERMATH)
                    return
                continue
            if not wait and (lives or (seen and found != seen)):
                raise ConfigError(
                    f"{self.folder} is held by {holder}. Two runs would double what they write: wait for its end, give "
                    "--wait to have this run wait, or name another folder"
                )
            if not told:
                for_what = "waiting for its end" if wait else f"watching for {duration(TIMEOUT)} whether it is alive"
                log.info(f"{self.folder} is held by {holder}; {for_what}")
                told = True
            if found != seen:
                seen, since = found, self._clock()
            self._sleep(_POLL)

    def renew(self) -> None:
        """Say that the holder is alive, unless another has taken over. What goes wrong is for the next time."""
        if self.problem():
            return
        now = self._clock()
        try:
            number, data = self._latest()
            holder = Holder.parse(data)
            if number != self._number or holder.token != self._holder.token:
                what = f"was taken over by {holder}" if number >= 0 else "was removed"
                self._lost = f"{self.folder} {what}"
                return
            self._holder = dataclasses.replace(self._holder, beat=self._holder.beat + 1)
            storage.publish(self._uri(self._number), self._holder.encode(), durable=False)
        except Exception as error:  # noqa: BLE001  a client's of any kind: if it lasts, `problem` ends the run
            self._failure = f" ({type(error).__name__}: {error})"
        else:
            self._renewed, self._failure = now, ""

    def problem(self) -> str:
        """Why the holder must write nothing more, or ""."""
        if not self._lost and self._clock() - self._renewed > TIMEOUT - _MARGIN:
            self._lost = f"{self.folder}: its lease was not renewed for {duration(TIMEOUT - _MARGIN)}{self._failure}"
        return self._lost

    def release(self) -> None:
        """Let others have it. The file stays, so that no number is ever used again."""
        self.renew()
        if not self.problem():
            released = dataclasses.replace(self._holder, released=True)
            storage.publish(self._uri(self._number), released.encode(), durable=False)

    def _claim(self, number: int) -> bool:
        self._renewed = self._clock()
        if not storage.create(self._uri(number), self._holder.encode()):
            return False
        others = [each for each in self._numbers() if each != number]
        if max(others, default=-1) > number:
            # Others have come and gone since the numbers were listed, and this one was free again.
            storage.remove(self._uri(number))
            return False
        self._number = number
        for older in others:
            storage.remove(self._uri(older))
        return True

    def _latest(self) -> tuple[int, bytes]:
        """The highest number and what its file holds; -1 and nothing where there is none."""
        while numbers := self._numbers():
            try:
                return max(numbers), storage.read(self._uri(max(numbers)))
            except FileNotFoundError:
                # Removed by who took over, between the two looks.
                continue
        return -1, b""

    def _numbers(self) -> list[int]:
        names = (uri.rsplit("/", 1)[-1].removesuffix(".json") for uri, _ in storage.files(self._uri_of_all()))
        return [int(name) for name in names if name.isdecimal()]

    def _uri_of_all(self) -> str:
        return storage.join(self.folder, _FOLDER)

    def _uri(self, number: int) -> str:
        return storage.join(self._uri_of_all(), f"{number}.json")


@contextmanager
def held(folder: str, wait: bool) -> Iterator[None]:
    """Hold the lease on a folder for the time of the block.

    Where it is lost the block is stopped as by SIGTERM, and the process ended if that takes too long.

    Args:
        folder: a URI.
        wait: for who holds it, instead of refusing.

    Raises:
        ConfigError: if another run holds it, or the folder cannot be written to.
        CutOffError: if the lease was lost meanwhile.
    """
    lease = Lease(storage.absolute(folder), Holder.this_process())
    try:
        lease.acquire(wait)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written to: {error}") from error
    ended = threading.Event()
    threads = [threading.Thread(target=each, args=(lease, ended), daemon=True) for each in (_renew, _watch)]
    for thread in threads:
        thread.start()
    try:
        yield
    except BaseException as error:
        if problem := lease.problem():
            raise _cut_off(problem) from error
        raise
    finally:
        ended.set()
        # One that hangs in storage is left alone: at worst the next run has to watch this lease for a while.
        threads[0].join(_RENEWAL)
        with suppress(OSError):
            lease.release()
    if problem := lease.problem():
        raise _cut_off(problem)


def _cut_off(problem: str) -> CutOffError:
    return CutOffError(f"{problem}; this run has stopped, what was done is kept. Run the same command again to go on")


def _renew(lease: Lease, ended: threading.Event) -> None:
    while not ended.wait(_RENEWAL):
        lease.renew()


def _watch(lease: Lease, ended: threading.Event) -> None:
    while not lease.problem():
        if ended.wait(1.0):
            return
    if callable(signal.getsignal(signal.SIGTERM)):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    if not ended.wait(_MARGIN / 2):
        print(f"error: {_cut_off(lease.problem())}", file=sys.stderr, flush=True)
        os._exit(SOME_FAILED)


def _machine() -> str:
    """This boot of this machine, and the namespace that process ids are of: containers of one machine differ in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _born(pid: int) -> str:
    """When a process started, in ticks since the boot; "" if there is no such process, or it is dead by now."""
    try:
        # The name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
