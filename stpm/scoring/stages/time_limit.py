"""Run tasks in threads with a time limit for each."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def run_within(seconds: float, workers: int, tasks: Sequence[Callable[[], T]], late: Callable[[int], T]) -> list[T]:
    """Run tasks side by side and return their results in order. What a task raises is raised here.

    Args:
        seconds: limit of one task, from its own start.
        workers: tasks that run at the same time.
        tasks: functions without arguments.
        late: makes the result of a task that exceeds the limit, given its index. The task's thread cannot be stopped:
            it stays behind, and the next task starts.
    """
    results: dict[int, T] = {}
    finished: SimpleQueue[tuple[int, Future[T]]] = SimpleQueue()
    waiting = deque(range(len(tasks)))
    # In the order of the starts of the tasks: the first deadline is the next one.
    deadlines: dict[int, float] = {}

    def run(index: int) -> None:
        future: Future[T] = Future()
        try:
            future.set_result(tasks[index]())
        except BaseException as error:  # noqa: BLE001
            future.set_exception(error)
        finished.put((index, future))

    while waiting or deadlines:
        while waiting and len(deadlines) < workers:
            deadlines[waiting[0]] = time.monotonic() + seconds
            # Unlike an executor's threads, a daemon lets the process end while a task hangs.
            Thread(target=run, args=[waiting.popleft()], name="fetch", daemon=True).start()
        oldest, deadline = next(iter(deadlines.items()))
        try:
            index, future = finished.get(timeout=max(deadline - time.monotonic(), 0.0))
        except Empty:
            del deadlines[oldest]
            results[oldest] = late(oldest)
            continue
        if deadlines.pop(index, None) is not None:
            results[index] = future.result()
    return [results[index] for index in range(len(tasks))]
