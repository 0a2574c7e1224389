"""The queue alone; the test takes the place of the workers."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from stpm.fitting.task import Epoch, FitResult, FitTask
from stpm.fitting.task_queue import MAX_NODE_LOSSES, WAIT, TaskQueue
from tests.conftest import MODELS, TINY


def task(name: str, images: int = 1) -> FitTask:
    return FitTask(name, tuple((f"{name}/{i}", 1) for i in range(images)), TINY, "store", "digest")


NODES = {"n1", "n2"}


def make_queue(*tasks: FitTask, living: set[str] = NODES) -> TaskQueue:
    return TaskQueue(tasks, lambda: living)


def results(queue: TaskQueue) -> dict[str, str]:
    """Return by category why it failed, or "" if it did not; each category may have only one result."""
    found = [(e.task.category, e.reason) for e in queue.events(0) if isinstance(e, FitResult)]
    assert len(dict(found)) == len(found)
    return dict(found)


def finish(queue: TaskQueue, taken: object) -> None:
    assert isinstance(taken, FitTask)
    queue.finish(FitResult(taken))


def test_longest_task_comes_first() -> None:
    queue = make_queue(task("short"), task("long", 9), task("middle", 5))
    taken = [queue.take("g", 2, "n1") for _ in range(3)]
    assert [t.category for t in taken if isinstance(t, FitTask)] == ["long", "middle", "short"]
    assert queue.take("g", 2, "n1") == WAIT
    for t in taken:
        finish(queue, t)
    assert queue.take("g", 2, "n1") is None


def test_a_memory_alone_shows_each_image_once() -> None:
    memory = dataclasses.replace(task("a", 9), recipe=MODELS["memory"])
    assert (memory.cost, task("a", 9).cost) == (9, 9 * TINY.epochs)


def test_after_a_worker_gives_up_the_others_end_their_tasks_and_no_other_starts() -> None:
    queue = make_queue(task("running", 9), task("waiting"))
    running = queue.take("g", 2, "n1")
    queue.give_up("no driver")
    assert queue.take("g", 2, "n1") == WAIT
    finish(queue, running)
    assert queue.take("g", 2, "n1") is None
    assert results(queue) == {"running": "", "waiting": "no driver"}


def test_category_with_two_seeds_is_two_tasks() -> None:
    other = dataclasses.replace(task("a"), recipe=dataclasses.replace(TINY, seed=1))
    queue = make_queue(task("a"), other)
    assert {queue.take("g", 2, "n1").key for _ in range(2)} == {"a (seed 0)", "a (seed 1)"}  # type: ignore[union-attr]


def test_events_are_returned_from_a_number_on() -> None:
    queue = make_queue(task("a"))
    epoch = Epoch(1, 0.5, 0.5, 10.0)
    finish(queue, queue.take("g", 2, "n1"))
    queue.report("a (seed 0)", epoch)
    assert queue.events(1) == [("a (seed 0)", epoch)]
    assert queue.events(2) == []


def test_quarantined_tasks_run_alone_and_only_the_deadly_one_fails() -> None:
    queue = make_queue(task("deadly", 9), task("healthy", 8), task("later"))
    assert [queue.take("1", 2, "n1").category for _ in range(2)] == ["deadly", "healthy"]  # type: ignore[union-attr]
    # The group dies and is restarted: tasks that are not quarantined go first.
    later = queue.take("2", 2, "n1")
    assert isinstance(later, FitTask)
    assert later.category == "later"
    assert queue.take("2", 2, "n1") == WAIT
    finish(queue, later)
    group, alone = "2", []
    while (taken := queue.take(group, 2, "n1")) is not None:
        assert isinstance(taken, FitTask), "nothing else runs, so there is no reason to wait"
        alone.append(taken.category)
        assert queue.take(group, 2, "n1") == WAIT, "a quarantined task runs alone"
        if taken.category == "deadly":
            group += "x"
        else:
            finish(queue, taken)
    assert sorted(alone) == ["deadly", "healthy"]
    found = results(queue)
    assert (found["later"], found["healthy"]) == ("", "")
    assert "died 2 times" in found["deadly"]


@given(st.integers(1, 8), st.integers(1, 4), st.data())
def test_every_task_ends_once_and_only_deadly_ones_fail(tasks: int, workers: int, data: st.DataObject) -> None:
    deadly = data.draw(st.sets(st.integers(0, tasks - 1)))
    order = data.draw(st.randoms(use_true_random=False))
    queue = make_queue(*(task(str(i)) for i in range(tasks)))
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
            elif int(mine.category) in deadly:
                group += 1
                held = dict.fromkeys(range(workers))
                break
            else:
                finish(queue, mine)
                held[worker] = None
    assert {int(category): bool(reason) for category, reason in results(queue).items()} == {
        number: number in deadly for number in range(tasks)
    }


def test_resizing_quarantines_no_task() -> None:
    queue = make_queue(task("a", 1), task("b", 1))
    for group, size in enumerate([1, 2, 1, 3, 2, 1]):
        taken = queue.take(str(group), size, "n1")
        assert isinstance(taken, FitTask)
        if size > 1:
            assert isinstance(queue.take(str(group), size, "n1"), FitTask), "no task is quarantined"
    assert not queue.events(0)


def test_lost_nodes_quarantine_no_task() -> None:
    """Replace the spot nodes of a group one after the other; its size stays the same."""
    living = {"n1", "n2"}
    queue = make_queue(task("a", 2), task("b"), living=living)
    for number in range(2, 9):
        for node in sorted(living):
            assert isinstance(queue.take(str(number), 2, node), FitTask), "no task is quarantined"
        living.remove(f"n{number}")
        living.add(f"n{number + 1}")
    assert not queue.events(0)


def test_a_task_whose_own_node_is_lost_again_and_again_fails() -> None:
    """Its memory may take down each node on which it runs; a task on other nodes goes on."""
    living = {"other"}
    queue = make_queue(task("deadly", 2), task("healthy"), living=living)
    for number in range(MAX_NODE_LOSSES):
        living.add(f"n{number}")
        taken = queue.take(str(number), 2, f"n{number}")
        assert isinstance(taken, FitTask)
        assert taken.category == "deadly"
        assert isinstance(queue.take(str(number), 2, "other"), FitTask)
        living.remove(f"n{number}")
    healthy = queue.take("last", 2, "other")
    finish(queue, healthy)
    assert queue.take("last", 2, "other") is None
    assert results(queue)["healthy"] == ""
    assert results(queue)["deadly"].startswith(f"the node that it ran on was lost {MAX_NODE_LOSSES} times")


def test_death_on_a_node_found_lost_later_does_not_count() -> None:
    living = {"n1", "n2", "n3"}
    queue = make_queue(task("a"), living=living)
    assert queue.take("1", 1, "n1") != WAIT
    for group, node, lost in (("2", "n2", "n1"), ("3", "n3", "n2"), ("4", "n3", "")):
        assert isinstance(queue.take(group, 1, node), FitTask), group
        living.discard(lost)
    assert queue.take("5", 1, "n3") is None, "it died twice on a node that is still alive"
    assert "died 2 times" in results(queue)["a"]
