"""Log the events of a fit: a line per epoch on a terminal; in a log file fewer lines, with every loss."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stpm.console import duration
from stpm.fitting.task import Epoch, Event, FitResult, FitTask

log = logging.getLogger(__name__)

_LOG_SECONDS = 5.0
_BAR_WIDTH = 20


@dataclass
class _TaskProgress:
    """One task: epochs that are not logged yet, time of the last line, first training loss, fraction that is done."""

    task: FitTask
    epochs: list[Epoch] = field(default_factory=list)
    logged_at: float | None = None
    first_loss: float | None = None
    fraction: float = 0.0

    @property
    def cost_done(self) -> float:
        return self.task.cost * self.fraction


class FitProgress:
    """Log events, and show a progress bar. Call it with each event, on one thread.

    Args:
        tasks: all tasks of the run.
        show: shows the progress bar on a terminal; None: there is none, epochs of one task that end within five
            seconds share a line, and the bar is logged after each task.
        clock: returns seconds; tests replace it.
    """

    def __init__(
        self, tasks: Sequence[FitTask], show: Callable[[str], None] | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._show = show
        self._min_seconds = 0.0 if show else _LOG_SECONDS
        self._tasks = {task.key: _TaskProgress(task) for task in tasks}
        self._key_width = max(map(len, self._tasks))
        self._ended = 0
        self._start = clock()

    def __call__(self, event: Event) -> None:
        if isinstance(event, FitResult):
            self._log_result(event)
        else:
            key, message = event
            if isinstance(message, Epoch):
                self._add_epoch(self._tasks[key], message)
            else:
                self._log(self._tasks[key].task, message)
        if self._show and self._ended < len(self._tasks):
            self._show(self._bar())
        elif isinstance(event, FitResult):
            log.info(self._bar())

    def _add_epoch(self, progress: _TaskProgress, epoch: Epoch) -> None:
        progress.epochs.append(epoch)
        progress.fraction = epoch.number / progress.task.recipe.epochs
        due = progress.logged_at is None or self._clock() - progress.logged_at >= self._min_seconds
        if due or epoch.number == progress.task.recipe.epochs:
            self._log_epochs(progress)

    def _log_epochs(self, progress: _TaskProgress) -> None:
        """Log the epochs of a task that are not logged yet, as one line."""
        epochs, progress.epochs = progress.epochs, []
        if not epochs:
            return
        progress.logged_at = self._clock()
        if progress.first_loss is None:
            progress.first_loss = epochs[0].train_loss
        first, last = epochs[0], epochs[-1]
        task = progress.task
        total = task.recipe.epochs
        numbers = f"{last.number:>{len(str(total))}}" if first is last else f"{first.number}-{last.number}"
        line = (
            f"epoch {numbers}/{total}  train loss {' '.join(f'{e.train_loss:.4f}' for e in epochs)}  "
            f"validation loss {' '.join(f'{e.validation_loss:.4f}' for e in epochs)}  "
            f"{last.images_per_second:.0f} images/s"
        )
        if last.number < total:
            images = len(task.train) - task.recipe.held_out(len(task.train))
            line += f"  {duration((total - last.number) * images / last.images_per_second)} left"
        if last.train_loss > progress.first_loss:
            line += f"  above its start, {progress.first_loss:.4f}: it may be diverging, lower --learning-rate"
        self._log(task, line)

    def _log_result(self, result: FitResult) -> None:
        progress = self._tasks[result.key]
        self._log_epochs(progress)
        self._ended += 1
        progress.fraction = 1.0
        if result.record is None:
            self._log(progress.task, f"failed: {result.reason}")
        else:
            fit = result.record.fit
            model = f"epoch {fit.kept_epoch} of {fit.epochs} kept" if fit.epochs else "memory only"
            self._log(progress.task, f"fitted in {fit.seconds:.1f} s, {model}")

    def _log(self, task: FitTask, text: str) -> None:
        log.info(f"{task.key:<{self._key_width}}  {text}", extra={"category": task.category})

    def _bar(self) -> str:
        done = sum(progress.cost_done for progress in self._tasks.values())
        total = sum(progress.task.cost for progress in self._tasks.values())
        filled = int(_BAR_WIDTH * done / total)
        bar = f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {self._ended}/{len(self._tasks)} ended"
        if 0 < done < total:
            bar += f", about {duration((self._clock() - self._start) * (total - done) / done)} left"
        return bar
