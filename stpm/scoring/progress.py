"""How far a pass is: stages report to an actor, the driver asks it, and tells."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray

from stpm.cluster.connection import on_driver_node
from stpm.console import duration
from stpm.errors import CutOffError

log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_LOG_SECONDS = 5.0
_SHOWN = 10


class Done(NamedTuple):
    """Rows that scorers are done with, those of them that are errors or anomalous; seconds that each stage computed.

    Seconds are those of a CPU core, but for the forward pass on a GPU. A task that ran twice counts twice.
    """

    rows: int = 0
    errors: int = 0
    anomalous: int = 0
    decode_seconds: float = 0.0
    forward_seconds: float = 0.0
    encode_seconds: float = 0.0

    def __add__(self, other: tuple[Any, ...]) -> Done:
        return Done(*(a + b for a, b in zip(self, other, strict=True)))


class Left(NamedTuple):
    """An image that no row is written of, and why: the next run tries it again."""

    uri: str
    error_kind: str
    error_message: str


class Tried(NamedTuple):
    """Images of a batch that a stage tried; `suspect` failed for what may not be their fault, the last as `error`."""

    stage: str
    images: int
    suspect: int
    error: str


class Breaker:
    """Opens, for good, once more than half of the latest images failed for what may not be their own fault.

    Args:
        window: images, at least.
    """

    def __init__(self, window: int = 256) -> None:
        self._window = window
        self._latest: deque[tuple[int, int]] = deque()
        self._rows = self._suspect = 0
        self.is_open = False

    def add(self, rows: int, suspect: int) -> None:
        self._latest.append((rows, suspect))
        self._rows += rows
        self._suspect += suspect
        while self._rows - self._latest[0][0] >= self._window:
            oldest = self._latest.popleft()
            self._rows -= oldest[0]
            self._suspect -= oldest[1]
        self.is_open |= self._rows >= self._window and 2 * self._suspect > self._rows

    def in_words(self) -> str:
        return f"{self._suspect} of the latest {self._rows} images failed"


class Tally:
    """The actor: sums what tasks report.

    Args:
        clock: seconds, for tests.
        breaks: say when the pass should end. Stages are looked at apart: those that come first run ahead.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, breaks: bool = True) -> None:
        self._clock = clock
        self._breaks = breaks
        self._done = Done()
        self._left: list[Left] = []
        self._breakers: defaultdict[str, Breaker] = defaultdict(Breaker)
        self._broken = ""
        # When how many rows were done, at most once a second.
        self._marks: list[tuple[float, int]] = []
        self._last = 0.0

    def add(self, done: Done, tried: Tried | None = None, left: Sequence[Left] = ()) -> str:
        """Returns why the pass should end, or ""."""
        self._done += done
        self._left += left[: _SHOWN - len(self._left)]
        if tried and self._breaks:
            breaker = self._breakers[tried.stage]
            breaker.add(tried.images, tried.suspect)
            if breaker.is_open and not self._broken:
                self._broken = f"{breaker.in_words()}, the last one as {tried.error}"
        self._last = self._clock()
        if done.rows and (not self._marks or self._last - self._marks[-1][0] >= _POLL_SECONDS):
            self._marks.append((self._last, self._done.rows))
        return self._broken

    def read(self) -> Done:
        return self._done

    def left(self) -> list[Left]:
        """The first that are left to the next run."""
        return self._left

    def broken(self) -> str:
        """Why the pass should end, or ""."""
        return self._broken

    def speed(self) -> float:
        """Rows per second without the first quarter of them, while processes start and models load; 0 if unknown.

        Until the last stage is done with the last of them, not only the scorers.
        """
        started = [mark for mark in self._marks if mark[1] >= self._done.rows / 4]
        since, before = started[0] if started else (0.0, 0)
        return (self._done.rows - before) / (self._last - since) if self._last > since else 0.0


class Report:
    """What a task calls with what it has done; nothing waits for it, but for a task whose images failed."""

    def __init__(self, tally: Any) -> None:
        self._tally = tally

    def __call__(self, done: Done, tried: Tried | None = None, left: Sequence[Left] = ()) -> None:
        """Raises CutOffError if so much failed that going on is of no use."""
        told = self._tally.add.remote(done, tried, left)
        if tried and tried.suspect and (reason := ray.get(told)):
            raise CutOffError(reason)

    def left(self) -> list[Left]:
        """See `Tally.left`."""
        left: list[Left] = ray.get(self._tally.left.remote())
        return left

    def broken(self) -> str:
        """See `Tally.broken`."""
        broken: str = ray.get(self._tally.broken.remote())
        return broken

    def total(self) -> Done:
        """All that was reported so far."""
        total: Done = ray.get(self._tally.read.remote())
        return total

    def speed(self) -> float:
        """See `Tally.speed`."""
        speed: float = ray.get(self._tally.speed.remote())
        return speed


class Progress:
    """Tells how far a pass is: at the bottom of a terminal, or as a line every five seconds in a log.

    Args:
        total: rows.
        show: rewrites the line at the bottom, where someone looks on; None in a log.
        clock: seconds, for tests.
    """

    def __init__(
        self, total: int, show: Callable[[str], None] | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total = total
        self._show = show
        self._clock = clock
        self._start = self._told = clock()
        self._first: tuple[float, int] | None = None

    def __call__(self, done: Done) -> None:
        now = self._clock()
        if done.rows and self._first is None:
            self._first = now, done.rows
        if self._show:
            self._show(self._line(done, now))
        elif now - self._told >= _LOG_SECONDS:
            self._told = now
            log.info(self._line(done, now))

    def _line(self, done: Done, now: float) -> str:
        rows = min(done.rows, self._total)
        line = f"{rows}/{self._total} images, {done.errors} errors, {done.anomalous} anomalous"
        # Ray's start and the models' loading are not the speed of what follows.
        since, before = self._first or (now, 0)
        if rows > before and now > since:
            speed = (rows - before) / (now - since)
            line += f", {speed:.0f} images/s, about {duration((self._total - rows) / speed)} left"
        return line


@contextmanager
def followed(progress: Progress, *, breaks: bool = True) -> Iterator[Report]:
    """What tasks report to in the block is told while it runs; it may end them, see `Tally`."""
    tally = ray.remote(num_cpus=0, scheduling_strategy=on_driver_node())(Tally).remote(breaks=breaks)
    report = Report(tally)
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(_POLL_SECONDS):
            progress(report.total())

    thread = threading.Thread(target=follow, name="score-progress", daemon=True)
    thread.start()
    try:
        yield report
    finally:
        stop.set()
        thread.join()
        ray.kill(tally)
