"""Run tasks in threads with a time limit for each."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TypeVar

T = TypeVar("T")


def run_within(seconds: float, workers: int, tasks: Sequence[Callable[[], T]], late: Callable[[int], T]) -> list[T]:
    """Run tasks side by side and return their results in order. What a task raises is raised here.

    Args:
        seconds: limit of one task, from its own start.
        workers: tasks that run at the same time.
        tasks: functions without arguments.
        late: make the result of a task that exceeds the limit, given its index. Its thread cannot be stopped: it is
            left behind, and the next task starts.
    """
    results: dict[int, T] = {}
    waiting = deque(enumerate(tasks))
    running: dict[Future[T], tuple[int, float]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            index, task = waiting.popleft()
            running[_start(task)] = index, time.monotonic() + seconds
        next_deadline = min(deadline for _, deadline in running.values())
        wait(running, max(next_deadline - time.monotonic(), 0.0), FIRST_COMPLETED)
        for future, (index, deadline) in list(running.items()):
            if future.done():
                results[index] = future.result()
            elif time.monotonic() >= deadline:
                results[index] = late(index)
            else:
                continue
            del running[future]
    return [results[index] for index in range(len(tasks))]


def _start(task: Callable[[], T]) -> Future[T]:
    """Run a task in a daemon thread. An executor's thread would keep the process from ending if the task hangs."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(task())
        except BaseException as error:  # noqa: BLE001
            future.set_exception(error)

    threading.Thread(target=run, name="fetch", daemon=True).start()
    return future
