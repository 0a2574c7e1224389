"""The progress of a run: stages report to an actor; the driver reads it once a second, and shows it.

On a terminal it is a line at the bottom, in a log a line every five seconds, or every 30 while it stays the same.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError

from stpm.cluster.connection import on_driver_node
from stpm.console import is_terminal, show_progress
from stpm.errors import RunInterruptedError
from stpm.models.libraries import NodeVersions, VersionCheck, installed_versions
from stpm.scoring.prometheus import Stage
from stpm.scoring.run_statistics import RunStatistics, UnfinishedImage
from stpm.times import duration

log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_LOG_SECONDS = 5.0
_SAME_SECONDS = 30.0
# Seconds between the times at which the number of finished images is kept, at least.
_MARK_SECONDS = 1.0
# A run stops once more than half of this number of images failed, the latest ones of a stage.
_LATEST = 256
# Number of unfinished images, and of warnings, that the actor keeps to show.
_MAX_UNFINISHED = 10
_MAX_WARNINGS = 10


class Snapshot(NamedTuple):
    """The state of a run: the sum of all reports, and the first ten images that are left to the next run.

    Args:
        stop_reason: why the run should stop, or "".
        warnings: the first ten different warnings of the scorers, in the order in which they came.
        more_warnings: the number of others that came after them, equal ones included.
    """

    statistics: RunStatistics
    unfinished: list[UnfinishedImage]
    stop_reason: str
    warnings: list[str]
    more_warnings: int = 0


class BatchReport(NamedTuple):
    """What a stage reports of one batch: of the images attempted, those left to the next run are unfinished.

    Args:
        external_errors: errors that may have a cause outside the image.
        origin: the process that processed the batch; `ProgressReporter` adds it.
    """

    stage: Stage
    statistics: RunStatistics
    attempted: int = 0
    external_errors: Sequence[str] = ()
    unfinished: Sequence[UnfinishedImage] = ()
    origin: NodeVersions | None = None


class ProgressActor:
    """The actor that adds up what the stages report.

    Args:
        clock: returns seconds; injected by tests.
        stop_on_failures: decide to stop the run when most images fail for a reason outside them. Each stage counts for
            itself, because the first stages run ahead of the last.
        versions: of the libraries that the run was started with, by name; None: those of the first node.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        stop_on_failures: bool = True,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        self._clock = clock
        self._stop_on_failures = stop_on_failures
        self._statistics = RunStatistics()
        self._unfinished: list[UnfinishedImage] = []
        # The errors of each stage's latest images, "" where there was none.
        self._latest: defaultdict[Stage, deque[str]] = defaultdict(lambda: deque(maxlen=_LATEST))
        self._stop_reason = ""
        self._versions = VersionCheck(versions)
        self._warnings: list[str] = []
        self._more_warnings = 0
        # (time, images finished by then), at most one a second.
        self._marks: list[tuple[float, int]] = []
        self._last_report = 0.0

    def add(self, report: BatchReport) -> str:
        """Add the report of one batch; return the reason to stop the run, or ""."""
        self._statistics += report.statistics
        if report.origin and (mixture := self._versions.add(report.origin)):
            self.warn(mixture)
        self._unfinished += report.unfinished[: _MAX_UNFINISHED - len(self._unfinished)]
        if report.attempted and self._stop_on_failures:
            latest, errors = self._latest[report.stage], report.external_errors
            latest.extend([*errors, *[""] * (report.attempted - len(errors))])
            failed = [error for error in latest if error]
            if len(latest) == _LATEST and 2 * len(failed) > _LATEST:
                self.stop(
                    f"{len(failed)} of the latest {_LATEST} images failed, the last one with {failed[-1]}. With "
                    "--accept-errors such errors become rows"
                )
        self._last_report = self._clock()
        if report.statistics.images and (not self._marks or self._last_report - self._marks[-1][0] >= _MARK_SECONDS):
            self._marks.append((self._last_report, self._statistics.images))
        return self._stop_reason

    def stop(self, reason: str) -> None:
        """Decide to stop the run."""
        self._stop_reason = self._stop_reason or reason

    def warn(self, message: str) -> None:
        """Keep a warning of a stage, unless it is known; of those after the first ten keep the number."""
        if message in self._warnings:
            return
        if len(self._warnings) < _MAX_WARNINGS:
            self._warnings.append(message)
        else:
            self._more_warnings += 1

    def read(self) -> Snapshot:
        """Return the state of the run."""
        statistics = replace(self._statistics, steady_images_per_second=round(self._steady_speed(), 3))
        return Snapshot(statistics, self._unfinished, self._stop_reason, self._warnings, self._more_warnings)

    def _steady_speed(self) -> float:
        """Return the images per second without the first quarter, when processes start and models load; 0 if unknown.

        Measure until the last report of any stage, not only of the scorers.
        """
        images = self._statistics.images
        time_then, images_then = next((mark for mark in self._marks if mark[1] >= images / 4), (self._last_report, 0))
        elapsed = self._last_report - time_then
        return (images - images_then) / elapsed if elapsed > 0 else 0.0


class ProgressReporter:
    """The stages' and the driver's handle of a `ProgressActor`."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def report(self, batch_report: BatchReport) -> None:
        """Report one batch. Return without waiting, except if images failed.

        Raises:
            RunInterruptedError: if so many images failed that the run should stop.
        """
        reply = self._actor.add.remote(batch_report._replace(origin=_this_process()))
        if batch_report.external_errors and (reason := ray.get(reply)):
            raise RunInterruptedError(reason)

    def stop(self, reason: str) -> None:
        """Stop the run."""
        ray.get(self._actor.stop.remote(reason))

    def warn(self, message: str) -> None:
        """Report a warning, which the driver logs once. Return without waiting."""
        self._actor.warn.remote(message)

    def read(self) -> Snapshot:
        """See `ProgressActor.read`."""
        snapshot: Snapshot = ray.get(self._actor.read.remote())
        return snapshot


@cache
def _this_process() -> NodeVersions:
    return NodeVersions(ray.util.get_node_ip_address(), installed_versions())


class WarningRelay(logging.Handler):
    """Send a scorer's warnings to the driver, which logs them. Tracebacks of errors are in the scorer's own log."""

    def __init__(self, progress: ProgressReporter) -> None:
        super().__init__(logging.WARNING)
        self.addFilter(lambda record: record.levelno == logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._progress.warn(record.getMessage())
        except Exception:  # noqa: BLE001  a message must never end the scoring that it is about
            self.handleError(record)


class ProgressDisplay:
    """Show the progress of a run: at the bottom of a terminal, or as a line every five seconds in a log.

    Args:
        show: rewrites the line at the bottom of the terminal; None if the output is a log.
    """

    def __init__(
        self, total: int, show: Callable[[str], None] | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total = total
        self._show = show
        self._clock = clock
        self._last_logged, self._last_line = clock(), ""
        self._warning_count = 0

    def update(self, snapshot: Snapshot) -> None:
        """Show the latest statistics, and log the warnings that are new."""
        for message in snapshot.warnings[self._warning_count :]:
            log.warning(message)
        self._warning_count = len(snapshot.warnings)
        statistics = snapshot.statistics
        images, speed = min(statistics.images, self._total), statistics.steady_images_per_second
        line = f"{images}/{self._total} images, {statistics.errors} errors, {statistics.anomalous} anomalous"
        if speed:
            line += f", {speed:.0f} images/s, about {duration((self._total - images) / speed)} left"
        if self._show:
            self._show(line)
        elif self._clock() - self._last_logged >= (_SAME_SECONDS if line == self._last_line else _LOG_SECONDS):
            self._last_logged, self._last_line = self._clock(), line
            log.info(line)

    def end(self, snapshot: Snapshot) -> None:
        """Show the last statistics, and how many warnings were not shown."""
        self.update(snapshot)
        if snapshot.more_warnings:
            log.warning(f"and {snapshot.more_warnings} more warnings")


@contextmanager
def show_scoring_progress(
    total: int, versions: Mapping[str, str] | None = None, *, stop_on_failures: bool
) -> Iterator[ProgressReporter]:
    """Start a progress actor for as many images, and show the progress while the block runs; see `ProgressActor`."""
    actor = ray.remote(num_cpus=0, scheduling_strategy=on_driver_node())(ProgressActor).remote(
        versions=versions, stop_on_failures=stop_on_failures
    )
    progress = ProgressReporter(actor)
    display = ProgressDisplay(total, show_progress if is_terminal() else None)
    ended = threading.Event()

    def poll() -> None:
        # If Ray lost the actor, the run's next report raises the error.
        with suppress(RayError):
            while not ended.wait(_POLL_SECONDS):
                display.update(progress.read())

    thread = threading.Thread(target=poll, name="score-progress", daemon=True)
    thread.start()
    try:
        try:
            yield progress
        finally:
            ended.set()
            thread.join()
        # It may have warnings of the last second.
        display.end(progress.read())
    finally:
        ray.kill(actor)
