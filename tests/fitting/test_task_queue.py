"""The queue alone, its workers played by the test."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from stpm.fitting.task import Epoch, FitTask, Outcome
from stpm.fitting.task_queue import WAIT, TaskQueue
from tests.conftest import TINY


def task(name: str, images: int = 1) -> FitTask:
    return FitTask(name, tuple((f"{name}/{i}", 1) for i in range(images)), TINY, "store", "digest")


NODES = {"n1", "n2"}


def queue_of(*tasks: FitTask, living: set[str] = NODES) -> TaskQueue:
    return TaskQueue(tasks, lambda: living)


def ended(queue: TaskQueue) -> dict[str, str]:
    return {e.category: e.status for e in queue.events(0) if isinstance(e, Outcome)}


def finish(queue: TaskQueue, taken: object) -> None:
    assert isinstance(taken, FitTask)
    queue.finish(Outcome(taken.key, taken.category, 0, "fitted"))


def test_the_longest_comes_first() -> None:
    queue = queue_of(task("short"), task("long", 9), task("middle", 5))
    taken = [queue.take("g", 2, "n1") for _ in range(3)]
    assert [t.category for t in taken if isinstance(t, FitTask)] == ["long", "middle", "short"]
    assert queue.take("g", 2, "n1") == WAIT
    for t in taken:
        finish(queue, t)
    assert queue.take("g", 2, "n1") is None


def test_the_same_category_with_two_seeds_is_two_tasks() -> None:
    other = dataclasses.replace(task("a"), recipe=dataclasses.replace(TINY, seed=1))
    queue = queue_of(task("a"), other)
    assert {queue.take("g", 2, "n1").key for _ in range(2)} == {"a (seed 0)", "a (seed 1)"}  # type: ignore[union-attr]


def test_events_are_read_from_where_one_left_off() -> None:
    queue = queue_of(task("a"))
    epoch = Epoch(1, 0.5, 0.5, 10.0)
    finish(queue, queue.take("g", 2, "n1"))
    queue.report("a (seed 0)", epoch)
    assert queue.events(1) == [("a (seed 0)", epoch)]
    assert queue.events(2) == []


def test_after_a_death_the_innocent_neighbour_is_fitted_and_the_guilty_set_aside() -> None:
    queue = queue_of(task("guilty", 9), task("innocent", 8), task("later"))
    assert [queue.take("1", 2, "n1").category for _ in range(2)] == ["guilty", "innocent"]  # type: ignore[union-attr]
    # The group dies and comes back: what nobody suspects goes first.
    later = queue.take("2", 2, "n1")
    assert isinstance(later, FitTask)
    assert later.category == "later"
    assert queue.take("2", 2, "n1") == WAIT
    finish(queue, later)
    group, alone = "2", []
    while (taken := queue.take(group, 2, "n1")) is not None:
        assert isinstance(taken, FitTask), "nothing else runs, so there is no reason to wait"
        alone.append(taken.category)
        assert queue.take(group, 2, "n1") == WAIT, "a suspect runs alone"
        if taken.category == "guilty":
            group += "x"
        else:
            finish(queue, taken)
    assert sorted(alone) == ["guilty", "innocent"]
    assert ended(queue) == {"later": "fitted", "innocent": "fitted", "guilty": "failed"}


@given(st.integers(1, 8), st.integers(1, 4), st.data())
def test_whatever_dies_every_task_ends_once_and_only_the_guilty_fail(
    tasks: int, workers: int, data: st.DataObject
) -> None:
    guilty = data.draw(st.sets(st.integers(0, tasks - 1)))
    order = data.draw(st.randoms(use_true_random=False))
    queue = queue_of(*(task(str(i)) for i in range(tasks)))
    group = 0
    held: dict[int, FitTask | None] = dict.fromkeys(range(workers))
    while held:
        for worker in order.sample(sorted(held), len(held)):
            mine = held[worker]
            if mine is None:
                taken = queue.take(str(group), 2, "n1")
                if taken is None:
                    del held[worker]
                elif isinstance(taken, FitTask):
                    held[worker] = taken
            elif int(mine.category) in guilty:
                group += 1
                held = dict.fromkeys(range(workers))
                break
            else:
                finish(queue, mine)
                held[worker] = None
    outcomes = [e for e in queue.events(0) if isinstance(e, Outcome)]
    assert sorted(o.category for o in outcomes) == sorted(map(str, range(tasks)))
    assert {int(o.category) for o in outcomes if o.status == "failed"} == guilty


def test_a_reason_is_given() -> None:
    queue = queue_of(task("guilty"))
    queue.take("1", 2, "n1")
    queue.take("2", 2, "n1")
    assert queue.take("3", 2, "n1") is None
    outcome = queue.events(0)[0]
    assert isinstance(outcome, Outcome)
    assert "died 2 times" in outcome.reason


def test_tasks_are_not_blamed_for_nodes_that_come_and_go() -> None:
    queue = queue_of(task("a", 1), task("b", 1))
    for group, size in enumerate([1, 2, 1, 3, 2, 1]):
        taken = queue.take(str(group), size, "n1")
        assert isinstance(taken, FitTask)
        if size > 1:
            assert isinstance(queue.take(str(group), size, "n1"), FitTask), "nobody runs alone"
    assert not queue.events(0)


def test_a_lost_node_is_nobodys_fault() -> None:
    """Spot nodes that are taken away and replaced, one after the other, under a group of the same size."""
    living = {"n1", "n2"}
    queue = queue_of(task("a", 2), task("b"), living=living)
    for number in range(2, 9):
        for node in sorted(living):
            assert isinstance(queue.take(str(number), 2, node), FitTask), "nobody runs alone"
        living.remove(f"n{number}")
        living.add(f"n{number + 1}")
    assert not queue.events(0)


def test_a_death_on_a_node_that_is_missed_late_does_not_count_later() -> None:
    living = {"n1", "n2", "n3"}
    queue = queue_of(task("a"), living=living)
    assert queue.take("1", 1, "n1") != WAIT
    for group, node, missed in (("2", "n2", "n1"), ("3", "n3", "n2"), ("4", "n3", "")):
        assert isinstance(queue.take(group, 1, node), FitTask), group
        living.discard(missed)
    assert queue.take("5", 1, "n3") is None, "it died twice on a node that lives on"
    assert ended(queue) == {"a": "failed"}
