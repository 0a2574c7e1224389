"""Log the events of a fit: a line per epoch on a terminal; in a log file fewer lines, with every loss."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stpm.fitting.task import Epoch, Event, FitResult, FitTask, FitWarning
from stpm.models.libraries import NodeVersions, VersionCheck
from stpm.times import duration

log = logging.getLogger(__name__)

_LOG_SECONDS = 5.0
# Longest silence of a log: banks of memory, and calibration folds, take minutes.
_SILENT_SECONDS = 30.0
_BAR_WIDTH = 20


@dataclass
class _TaskProgress:
    """A task, with its epochs so far."""

    task: FitTask
    epochs: list[Epoch] = field(default_factory=list)
    logged_count: int = 0
    logged_at: float = float("-inf")
    ended: bool = False

    def cost(self, *, earlier: bool = False) -> float:
        """Return the cost of what is done, or of what earlier runs of the job did."""
        if self.ended and not earlier:
            return self.task.cost
        number = (self.epochs[0].number - 1 if earlier else self.epochs[-1].number) if self.epochs else 0
        return self.task.cost * number / self.task.recipe.epochs


class FitProgress:
    """Log events, and show a progress bar. Call it with each event, and now and then with None, on one thread.

    Args:
        show: shows the progress bar on a terminal. None: log the bar after each task, and as one line the epochs of a
            task that end within five seconds.
        clock: returns seconds; tests replace it.
    """

    def __init__(
        self, tasks: Sequence[FitTask], show: Callable[[str], None] | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._show = show
        self._tasks = {task.key: _TaskProgress(task) for task in tasks}
        self._versions = VersionCheck()
        self._start = self._said = clock()

    def __call__(self, event: Event | None) -> None:
        if not event and self._clock() - self._said < _SILENT_SECONDS:
            return
        self._said = self._clock()
        match event:
            case None:
                log.info(f"{self._bar()}, at work for {self._said - self._start:.0f} s")
            case FitResult():
                self._end(event)
            case (key, Epoch() as epoch):
                self._add_epoch(self._tasks[key], epoch)
            case (key, str() as message):
                level = logging.WARNING if isinstance(message, FitWarning) else logging.INFO
                self._log(self._tasks[key].task, message, level)
        if self._show and not all(progress.ended for progress in self._tasks.values()):
            self._show(self._bar())
        elif isinstance(event, FitResult):
            log.info(self._bar())

    def _end(self, result: FitResult) -> None:
        progress = self._tasks[result.task.key]
        progress.ended = True
        self._log_epochs(progress)
        self._log(result.task, _describe(result), logging.INFO if result.record else logging.ERROR)
        if result.record and (mixture := self._versions.add(NodeVersions(result.node, result.record.library_versions))):
            self._log(result.task, mixture, logging.WARNING)

    def _add_epoch(self, progress: _TaskProgress, epoch: Epoch) -> None:
        if progress.epochs and epoch.number <= progress.epochs[-1].number:
            # A worker died, and its task goes on from a checkpoint.
            self._log_epochs(progress)
        progress.epochs.append(epoch)
        waited = self._clock() - progress.logged_at
        if self._show or waited >= _LOG_SECONDS or epoch.number == progress.task.recipe.epochs:
            self._log_epochs(progress)

    def _log_epochs(self, progress: _TaskProgress) -> None:
        """Log the new epochs of a task as one line."""
        epochs = progress.epochs[progress.logged_count :]
        if not epochs:
            return
        progress.logged_count, progress.logged_at = len(progress.epochs), self._clock()
        first, last, start = epochs[0], epochs[-1], progress.epochs[0].train_loss
        task, total = progress.task, progress.task.recipe.epochs
        numbers = f"{last.number:>{len(str(total))}}" if first is last else f"{first.number}-{last.number}"
        line = (
            f"epoch {numbers}/{total}  train loss {' '.join(f'{e.train_loss:.4f}' for e in epochs)}  "
            f"validation loss {' '.join(f'{e.validation_loss:.4f}' for e in epochs)}  "
            f"{last.images_per_second:.0f} images/s"
        )
        if last.number < total:
            images = len(task.train) - task.recipe.held_out_count(len(task.train))
            line += f"  {duration((total - last.number) * images / last.images_per_second)} of this training left"
        if last.train_loss > start:
            line += f"  above its start, {start:.4f}: it may be diverging, lower --learning-rate"
        self._log(task, line)

    def _log(self, task: FitTask, text: str, level: int = logging.INFO) -> None:
        log.log(level, f"{task.key:<{max(map(len, self._tasks))}}  {text}", extra={"category": task.category})

    def _bar(self) -> str:
        every = self._tasks.values()
        done, total = sum(each.cost() for each in every), sum(each.task.cost for each in every)
        filled = int(_BAR_WIDTH * done / total)
        bar = f"[{'#' * filled:.<{_BAR_WIDTH}}] {sum(each.ended for each in every)}/{len(every)} ended"
        done_here = done - sum(each.cost(earlier=True) for each in every)
        if done_here > 0 and done < total:
            bar += f", about {duration((self._clock() - self._start) * (total - done) / done_here)} left"
        return bar


def _describe(result: FitResult) -> str:
    if result.record is None:
        return f"failed: {result.reason}"
    fit = result.record.fit
    model = f"epoch {fit.kept_epoch} of {fit.epochs} kept" if fit.epochs else "memory only"
    return f"fitted in {fit.seconds:.1f} s, {model}"
