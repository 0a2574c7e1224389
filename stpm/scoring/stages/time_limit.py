"""Run tasks in threads with a time limit for each."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class LimitedTask(Protocol[T_co]):
    """A task that knows its own time limit: while it waits for another task, its time stands still."""

    def __call__(self) -> T_co:
        """Do the task, in a thread."""

    def seconds_left(self) -> float:
        """Return the seconds until the task is late. It is asked again once they have passed."""

    def late(self) -> T_co:
        """Give up the task: free what other tasks wait for, and return its result."""


def run_within(workers: int, tasks: Sequence[LimitedTask[T]]) -> list[T]:
    """Run tasks side by side and return their results in order. What a task raises is raised here.

    The thread of a task that is late cannot be stopped: it stays behind, and the next task starts.

    Args:
        workers: tasks that run at the same time.
        tasks: each is called once.
    """
    results: dict[int, T] = {}
    finished: SimpleQueue[tuple[int, Future[T]]] = SimpleQueue()
    waiting = deque(range(len(tasks)))
    running: set[int] = set()

    def run(index: int) -> None:
        future: Future[T] = Future()
        try:
            future.set_result(tasks[index]())
        except BaseException as error:  # noqa: BLE001
            future.set_exception(error)
        finished.put((index, future))

    while waiting or running:
        while waiting and len(running) < workers:
            running.add(waiting[0])
            # Unlike an executor's threads, a daemon lets the process end while a task hangs.
            Thread(target=run, args=[waiting.popleft()], name="fetch", daemon=True).start()
        try:
            index, future = finished.get(timeout=max(min(tasks[i].seconds_left() for i in running), 0.0))
        except Empty:
            late = {i for i in running if tasks[i].seconds_left() <= 0}
            running -= late
            results |= {i: tasks[i].late() for i in late}
            continue
        if index in running:
            running.remove(index)
            results[index] = future.result()
    return [results[index] for index in range(len(tasks))]
