"""A lease on a folder: one run at a time writes there, on a local disk or in an object store.

The file <folder>/.lease/<n>.json with the highest n names the holder. It is created exclusively: of two runs that want
n + 1, one gets it. The holder rewrites its file every few seconds. Other runs watch the file: while it changes, the
holder is alive; when it has not changed for `TIMEOUT`, they take over. No clocks of two machines are compared. A holder
that could not rewrite its file for nearly as long stops, before any other run may take over.
"""

from __future__ import annotations

import dataclasses
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
from dataclasses import dataclass, field
from pathlib import Path

from stpm import storage
from stpm.console import visible
from stpm.errors import HOW_TO_CONTINUE, ConfigError, RunInterruptedError
from stpm.exit_codes import SOME_FAILED
from stpm.names import hide_urls
from stpm.records import from_json, to_json
from stpm.times import duration, timestamp

log = logging.getLogger(__name__)

# In seconds. TIMEOUT is longer than the retries of storage: an outage of a minute stops no run.
TIMEOUT = 90.0
_RENEWAL = 10.0
_POLL = 2.0
# A holder that could not renew its lease stops this long before others may take over; its process ends halfway there.
_MARGIN = 20.0
# Time in which everything ends that a killed driver started on its cluster.
_SHUTDOWN = 5.0


def _clock() -> float:
    """Return seconds that also pass while the machine sleeps, where the system has such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease, as its file describes it; `host`, `command` and `since` are for people.

    Args:
        acquisition: unique id of this taking of the lease; "" of a holder that is not known.
        machine: boot id and process namespace, in which `pid` and `start` have a meaning; "" if unknown.
        start: when the process started, in ticks since the boot.
        command: its command line, without secrets that web URLs in it may hold.
        renewals: how often the file was written again: it changes while the process is alive.
        released: the process has given the lease back.
    """

    acquisition: str = ""
    host: str = ""
    machine: str = ""
    pid: int = 0
    start: str = ""
    command: str = ""
    since: str = ""
    renewals: int = 0
    released: bool = False

    @classmethod
    def this_process(cls) -> Holder:
        """Describe this process."""
        return cls(
            acquisition=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            start=_process_start(os.getpid()),
            command=shlex.join(map(hide_urls, sys.argv)),
            since=timestamp(),
        )

    @classmethod
    def parse(cls, data: bytes) -> Holder:
        """Parse a lease's file. The holder is unknown if it is not valid: a file just created may be empty."""
        try:
            return from_json(cls, data)
        except ValueError:
            return cls()

    def is_alive(self) -> bool | None:
        """Return whether the process runs; None if it is not one of this machine's."""
        if not self.machine or self.machine != _machine():
            return None
        return bool(self.start) and _process_start(self.pid) == self.start

    def __str__(self) -> str:
        if not self.acquisition:
            return "an unknown run"
        return f"process {self.pid} on {self.host}, since {self.since}: {self.command}"


@dataclass(frozen=True)
class Fence:
    """The lease on a folder that its holder's driver and tasks write under; later leases have higher numbers."""

    folder: str
    number: int


def check(fence: Fence | None) -> None:
    """Raise RunInterruptedError if another run has taken the lease since; None: there is no lease.

    This shortens the time in which a process that was suspended still writes. It does not end it: the process may be
    suspended between the check and the write.
    """
    if fence and (latest := max(_numbers(fence.folder), default=-1)) != fence.number:
        raise _interrupted(f"{fence.folder}: lease {fence.number} is lost, the latest is {latest}")


@dataclass
class Lease:
    """The lease on a folder, wanted or held by a process. `clock` returns seconds, and `sleep` waits for some."""

    folder: str
    holder: Holder
    clock: Callable[[], float] = _clock
    sleep: Callable[[float], object] = time.sleep
    number: int = field(default=-1, init=False)
    _renewed: float = field(default=0.0, init=False)
    _renewal_error: str = field(default="", init=False)
    _lost_because: str = field(default="", init=False)

    def acquire(self, wait: bool) -> None:
        """Take the lease: at once if it is free or its holder is known to be dead, else once it has timed out.

        Raises:
            ConfigError: if another process holds the lease and is alive, unless this one is to `wait` for it.
        """
        watched: tuple[int, bytes] | None = None
        since = self.clock()
        while True:
            latest = number, data = self._latest()
            holder = Holder.parse(data)
            alive = holder.is_alive()
            timed_out = latest == watched and self.clock() - since >= TIMEOUT
            if number < 0 or holder.released or alive is False or (alive is None and timed_out):
                if self._claim(number + 1):
                    if alive is False and not holder.released:
                        self.sleep(_SHUTDOWN)
                    return
                continue
            if not wait and (alive or (watched and latest != watched)):
                raise ConfigError(
                    f"{self.folder} is held by {holder}. Two runs would write everything twice: wait for its end, give "
                    "--wait to have this run wait, or name another folder"
                )
            if not watched:
                action = "waiting for its end" if wait else f"watching for {duration(TIMEOUT)} whether it is alive"
                log.info(f"{self.folder} is held by {holder}; {action}")
            if latest != watched:
                watched, since = latest, self.clock()
            self.sleep(_POLL)

    def renew(self) -> None:
        """Rewrite the lease's file, unless another process took over. If this fails, the next renewal tries again."""
        if self.why_lost():
            return
        now = self.clock()
        try:
            number, data = self._latest()
            holder = Holder.parse(data)
            if number != self.number or holder.acquisition != self.holder.acquisition:
                self._lost_because = f"{self.folder} was {f'taken over by {holder}' if number >= 0 else 'removed'}"
                return
            self._publish(dataclasses.replace(self.holder, renewals=self.holder.renewals + 1))
        except Exception as error:  # noqa: BLE001  a client's of any kind: if it lasts, the lease is lost
            self._renewal_error = f"{type(error).__name__}: {error}"
        else:
            self._renewed, self._renewal_error = now, ""

    def why_lost(self) -> str:
        """Return why the holder has lost the lease and must not write any more; "" while it has it.

        A lease that was not renewed in time stays lost: another run may have taken over.
        """
        if not self._lost_because and self.clock() - self._renewed > TIMEOUT - _MARGIN:
            error = f" ({self._renewal_error})" if self._renewal_error else ""
            self._lost_because = f"{self.folder}: its lease was not renewed for {duration(TIMEOUT - _MARGIN)}{error}"
        return self._lost_because

    def release(self) -> None:
        """Free the lease for others. The file stays, so that no number is used twice."""
        self.renew()
        if not self.why_lost():
            self._publish(dataclasses.replace(self.holder, released=True))

    def _publish(self, holder: Holder) -> None:
        self.holder = holder
        storage.publish(self._uri(self.number), to_json(holder, indent=None), durable=False)

    def _claim(self, number: int) -> bool:
        self._renewed = self.clock()
        if not storage.create(self._uri(number), to_json(self.holder, indent=None)):
            return False
        others = [other for other in _numbers(self.folder) if other != number]
        if max(others, default=-1) > number:
            # Other runs used this number, a higher one, and removed this one since the numbers were listed.
            storage.remove(self._uri(number))
            return False
        self.number = number
        for older in others:
            # Credentials that may not delete there leave them.
            with suppress(PermissionError):
                storage.remove(self._uri(older))
        return True

    def _latest(self) -> tuple[int, bytes]:
        """Return the highest number and its file's content; -1 and b"" if there is none."""
        while numbers := _numbers(self.folder):
            # A run that takes over may remove the file before it is read.
            with suppress(FileNotFoundError):
                return max(numbers), storage.read(self._uri(max(numbers)))
        return -1, b""

    def _uri(self, number: int) -> str:
        return f"{self.folder}/.lease/{number}.json"


def _numbers(folder: str) -> list[int]:
    names = (uri.rsplit("/", 1)[-1].removesuffix(".json") for uri in storage.files(f"{folder}/.lease"))
    return [int(name) for name in names if name.isdecimal()]


@contextmanager
def hold_lease(folder: str, wait: bool) -> Iterator[Fence]:
    """Hold the lease on a folder during the block.

    If the lease is lost, the block is interrupted as by SIGTERM; the process is ended if the block goes on.

    Raises:
        ConfigError: if the folder cannot be written to, or another process holds the lease and this one is not to
            `wait` for it.
        OSError: if the disk is full.
        RunInterruptedError: if the lease was lost during the block.
    """
    lease = Lease(storage.absolute(folder), Holder.this_process())
    try:
        lease.acquire(wait)
    except OSError as error:
        if error.errno in storage.FULL_DISK:
            raise
        raise ConfigError(
            f"{folder}: cannot be written to: {error}; check the disk, and what the credentials allow; an outage passes"
        ) from error
    ended = threading.Event()
    threads = [threading.Thread(target=target, args=(lease, ended), daemon=True) for target in (_renew, _watch)]
    for thread in threads:
        thread.start()
    try:
        yield Fence(lease.folder, lease.number)
    except BaseException as error:
        if reason := lease.why_lost():
            raise _interrupted(reason) from error
        raise
    finally:
        ended.set()
        # Do not wait for a renewal that hangs in storage: at worst the next run watches this lease for a while.
        threads[0].join(_RENEWAL)
        with suppress(OSError):
            lease.release()
    if reason := lease.why_lost():
        raise _interrupted(reason)


def _interrupted(reason: str) -> RunInterruptedError:
    return RunInterruptedError(f"{reason}; this run has stopped: {HOW_TO_CONTINUE}")


def _renew(lease: Lease, ended: threading.Event) -> None:
    while not ended.wait(_RENEWAL):
        lease.renew()


def _watch(lease: Lease, ended: threading.Event) -> None:
    """Interrupt the block once the lease is lost, and end the process if the block goes on."""
    while not lease.why_lost():
        if ended.wait(1.0):
            return
    if callable(signal.getsignal(signal.SIGTERM)):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    if not ended.wait(_MARGIN / 2):
        print(visible(f"error: {_interrupted(lease.why_lost())}"), file=sys.stderr, flush=True)
        os._exit(SOME_FAILED)


def _machine() -> str:
    """Identify this boot of this machine and its namespace of process ids, which differs between containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """Return when a process started, in ticks since the boot; "" if there is none, or it is dead."""
    try:
        # The process's name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
