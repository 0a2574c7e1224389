"""Tells what happens in the pool: a line per epoch where someone watches, fewer in a log file, none lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

from stpm.console import duration
from stpm.fitting.task import Epoch, FitTask, Outcome
from stpm.fitting.task_queue import Event

log = logging.getLogger(__name__)

_LOG_SECONDS = 5.0
_BAR = 20


class FitProgress:
    """Called with each event of a pool, on one thread.

    Args:
        tasks: all that the pool runs.
        show: rewrites the line at the bottom, where someone looks on; None: a log, in which a task's epochs are
            gathered, and told at most every five seconds.
        clock: seconds, for tests.
    """

    def __init__(
        self, tasks: Sequence[FitTask], show: Callable[[str], None] | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._show = show
        self._pause = 0.0 if show else _LOG_SECONDS
        self._tasks = {task.key: task for task in tasks}
        self._width = max(map(len, self._tasks))
        self._gathered: dict[str, list[Epoch]] = {}
        self._told: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._ended = 0
        self._epochs_done: dict[str, int] = {}
        self._start = clock()

    def __call__(self, event: Event) -> None:
        self._tell(event)
        if self._show and self._ended < len(self._tasks):
            self._show(self._bar())
        elif isinstance(event, Outcome):
            log.info(self._bar())

    def _tell(self, event: Event) -> None:
        if isinstance(event, Outcome):
            self._tell_epochs(event.key)
            self._tell_outcome(event)
            return
        key, told = event
        if isinstance(told, str):
            self._line(key, told)
            return
        self._gathered.setdefault(key, []).append(told)
        self._epochs_done[key] = told.number
        last = told.number == self._tasks[key].recipe.epochs
        if last or self._clock() - self._told.get(key, -self._pause) >= self._pause:
            self._tell_epochs(key)

    def _tell_epochs(self, key: str) -> None:
        epochs = self._gathered.pop(key, [])
        if not epochs:
            return
        self._told[key] = self._clock()
        first = self._first.setdefault(key, epochs[0].train_loss)
        task = self._tasks[key]
        total = str(task.recipe.epochs)
        numbers = (
            f"{epochs[-1].number:>{len(total)}}" if len(epochs) == 1 else f"{epochs[0].number}-{epochs[-1].number}"
        )
        left = (task.recipe.epochs - epochs[-1].number) * (
            len(task.train) - task.recipe.held_out_count(len(task.train))
        )
        speed = epochs[-1].images_per_second
        line = (
            f"epoch {numbers}/{total}  train loss {_several(e.train_loss for e in epochs)}  "
            f"validation loss {_several(e.validation_loss for e in epochs)}  {speed:.0f} images/s"
        )
        if left:
            line += f"  {duration(left / speed)} left"
        if epochs[-1].train_loss > first:
            line += f"  above its start, {first:.4f}: it may be diverging, lower --learning-rate"
        self._line(key, line)

    def _tell_outcome(self, outcome: Outcome) -> None:
        self._ended += 1
        if outcome.record is None:
            self._line(outcome.key, f"failed: {outcome.reason}")
        else:
            fit = outcome.record.fit
            what = f"epoch {fit.kept_epoch} of {fit.epochs} kept" if fit.epochs else "a memory alone"
            self._line(outcome.key, f"fitted in {fit.seconds:.1f} s, {what}")
        self._epochs_done[outcome.key] = self._tasks[outcome.key].recipe.epochs

    def _bar(self) -> str:
        total = len(self._tasks)
        done = sum(task.cost * self._epochs_done.get(key, 0) / task.recipe.epochs for key, task in self._tasks.items())
        whole = sum(task.cost for task in self._tasks.values())
        filled = int(_BAR * done / whole)
        line = f"[{'#' * filled}{'.' * (_BAR - filled)}] {self._ended}/{total} ended"
        if 0 < done < whole:
            line += f", about {duration((self._clock() - self._start) * (whole - done) / done)} left"
        return line

    def _line(self, key: str, text: str) -> None:
        log.info(f"{key:<{self._width}}  {text}", extra={"category": self._tasks[key].category})


def _several(losses: Iterable[float]) -> str:
    return " ".join(f"{loss:.4f}" for loss in losses)
