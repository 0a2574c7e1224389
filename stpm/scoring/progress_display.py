"""Show the progress of a run: the driver reads it once a second and logs it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import ray
from ray.exceptions import RayError

from stpm.cluster.connection import on_driver_node
from stpm.console import is_terminal, show_progress
from stpm.scoring.progress import ProgressActor, ProgressReporter, Snapshot
from stpm.times import duration

log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_LOG_SECONDS = 5.0


class ProgressDisplay:
    """Show the progress of a run: at the bottom of a terminal, or as a line every five seconds in a log.

    Args:
        total: images to score.
        show: rewrites the line at the bottom of the terminal; None if the output is a log.
        clock: returns seconds; injected by tests.
    """

    def __init__(
        self, total: int, show: Callable[[str], None] | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total = total
        self._show = show
        self._clock = clock
        self._last_logged = clock()
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
        elif self._clock() - self._last_logged >= _LOG_SECONDS:
            self._last_logged = self._clock()
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
    """Start a progress actor, and show the progress while the block runs. Needs a connection to Ray.

    Args:
        total: images to score.
        versions: of the libraries that the run was started with, by name; None: those of the first node.
        stop_on_failures: stop the run when most images fail, see `ProgressActor`.
    """
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
