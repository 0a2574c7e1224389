"""Work in threads with a limit of time for each piece: what hangs is left behind, and the others go on."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def run_within(seconds: float, workers: int, tasks: Sequence[Callable[[], T]], late: Callable[[int], T]) -> list[T]:
    """Results of the tasks, in their order.

    Args:
        seconds: that one task may take, from its own start.
        workers: tasks that run at a time.
        tasks: functions of no argument. What one raises is raised here.
        late: gives the result of a task that takes longer, by its index. Its thread cannot be stopped: another one
            takes its place.
    """
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    started: dict[int, float] = {}
    waiting = deque(range(len(tasks)))
    changed = threading.Condition()

    def work() -> None:
        while True:
            with changed:
                if not waiting or errors:
                    return
                index = waiting.popleft()
                started[index] = time.monotonic()
            try:
                result = tasks[index]()
            except BaseException as error:  # noqa: BLE001
                with changed:
                    errors.append(error)
                    changed.notify()
                return
            with changed:
                if started.pop(index, None) is None:
                    return
                results[index] = result
                changed.notify()

    def hire() -> None:
        threading.Thread(target=work, name="fetch", daemon=True).start()

    for _ in range(min(workers, len(tasks))):
        hire()
    with changed:
        while len(results) < len(tasks) and not errors:
            oldest = min(started.values(), default=time.monotonic())
            changed.wait(max(oldest + seconds - time.monotonic(), 0.01))
            for index in [i for i, since in started.items() if time.monotonic() - since >= seconds]:
                del started[index]
                results[index] = late(index)
                hire()
    if errors:
        raise errors[0]
    return [results[index] for index in range(len(tasks))]
