from __future__ import annotations

import threading
import time

import pytest

from stpm.scoring.stages.time_limit import run_within


def late(index: int) -> int:
    return -1 - index


def test_results_come_in_the_order_of_the_tasks() -> None:
    def task(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number

    assert run_within(60, 4, [lambda n=n: task(n) for n in range(50)], late) == list(range(50))  # type: ignore[misc]
    assert run_within(60, 4, [], late) == []


def test_tasks_that_hang_are_late_and_all_others_run() -> None:
    # More tasks hang than there are workers: without new threads the last tasks would never start.
    release = threading.Event()
    tasks = [lambda n=n: (release.wait(60), n)[1] if n < 5 else n for n in range(12)]  # type: ignore[misc]
    assert run_within(0.2, 2, tasks, late) == [-1, -2, -3, -4, -5, *range(5, 12)]
    release.set()


def test_no_more_tasks_run_at_the_same_time_than_workers() -> None:
    running = peak = 0
    lock = threading.Lock()

    def task() -> None:
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    run_within(60, 3, [task] * 20, lambda index: None)
    assert peak == 3


def test_an_error_of_a_task_is_raised() -> None:
    def broken() -> int:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run_within(60, 2, [lambda: 1, broken, lambda: 2], late)
