from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from stpm.scoring.stages.time_limit import run_within


@dataclass
class Task:
    """Task `number` returns its number, or -1 if it is late: after `limit` seconds in which it runs."""

    number: int
    limit: float = 60.0
    action: Callable[[], object] = lambda: None
    began: float = math.inf

    def __call__(self) -> int:
        self.began = time.monotonic()
        self.action()
        return self.number

    def seconds_left(self) -> float:
        return self.limit + min(self.began - time.monotonic(), 0.0)

    def late(self) -> int:
        return -1


def test_results_come_in_the_order_of_the_tasks() -> None:
    tasks = [Task(n, action=lambda n=n: time.sleep(0.002 * (n % 3))) for n in range(50)]  # type: ignore[misc]
    assert run_within(4, tasks) == list(range(50))
    assert run_within(4, []) == []


def test_tasks_that_hang_are_late_and_all_others_run() -> None:
    # More tasks hang than there are workers: without new threads the last tasks would never start.
    release = threading.Event()
    tasks = [Task(n, 0.2, (lambda: release.wait(60)) if n < 5 else (lambda: None)) for n in range(12)]
    assert run_within(2, tasks) == [-1] * 5 + list(range(5, 12))
    release.set()


def test_a_task_whose_time_stands_still_is_not_late() -> None:
    waiting = Task(0, 0.1)

    def wait() -> None:
        waiting.began = math.inf
        time.sleep(0.4)

    waiting.action = wait
    assert run_within(2, [waiting, Task(1)]) == [0, 1]


def test_no_more_tasks_run_at_the_same_time_than_workers() -> None:
    running = peak = 0
    lock = threading.Lock()

    def count() -> None:
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    run_within(3, [Task(n, action=count) for n in range(20)])
    assert peak == 3


def test_an_error_of_a_task_is_raised() -> None:
    def broken() -> int:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run_within(2, [Task(0), Task(1, action=broken), Task(2)])
