"""Losses and speed per epoch as TensorBoard's event files: off unless a folder is named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stpm import storage
from stpm.fitting.task import Epoch, FitTask, Outcome
from stpm.fitting.task_queue import Event


class EventFiles:
    """Called with each event of a pool, on one thread; writes `<folder>/seed-<seed>/<category>/`.

    Args:
        folder: local.
        tasks: all that the pool runs.
    """

    def __init__(self, folder: str, tasks: Sequence[FitTask]) -> None:
        self._folder = Path(folder)
        self._tasks = {task.key: task for task in tasks}
        self._writers: dict[str, Any] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Outcome):
            if writer := self._writers.pop(event.key, None):
                writer.close()
            return
        key, told = event
        if isinstance(told, Epoch):
            writer = self._writers.get(key) or self._open(key)
            writer.add_scalar("loss/train", told.train_loss, told.number)
            writer.add_scalar("loss/validation", told.validation_loss, told.number)
            writer.add_scalar("images_per_second", told.images_per_second, told.number)

    def _open(self, key: str) -> Any:
        # Its import takes over a second, and most fits need none.
        from tensorboardX import SummaryWriter

        task = self._tasks[key]
        folder = self._folder / f"seed-{task.recipe.seed}" / storage.safe_name(task.category, "category")
        self._writers[key] = SummaryWriter(str(folder))
        return self._writers[key]
