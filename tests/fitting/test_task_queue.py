"""The queue alone; the test takes the place of the workers."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from stpm.fitting.task import Epoch, FitResult, FitTask
from stpm.fitting.task_queue import MAX_NODE_LOSSES, WAIT, TaskQueue
from tests.conftest import MODELS, TINY

NODES = {"n1", "n2"}


def task(name: str, images: int = 1) -> FitTask:
    return FitTask(name, tuple((f"{name}/{i}", 1) for i in range(images)), TINY, "store", "digest")


def make_queue(*tasks: FitTask, living: set[str] = NODES) -> TaskQueue:
    return TaskQueue(tasks, lambda: living)


def take(queue: TaskQueue, group: object = "g", size: int = 2, node: str = "n1") -> FitTask:
    taken = queue.take(str(group), size, node)
    assert isinstance(taken, FitTask), "no task is quarantined, and one waits"
    return taken


def results(queue: TaskQueue) -> dict[str, str]:
    """Return by category why it failed, or "" if it did not; each category may have only one result."""
    found = [(e.task.category, e.reason) for e in queue.events(0) if isinstance(e, FitResult)]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_longest_task_comes_first_and_events_are_returned_from_a_number_on() -> None:
    seeded = dataclasses.replace(task("short"), recipe=dataclasses.replace(TINY, seed=1))
    memory = dataclasses.replace(task("memory", 9), recipe=MODELS["memory"])
    assert (memory.cost, task("long", 9).cost) == (9, 9 * TINY.epochs)
    queue = make_queue(task("short"), task("long", 9), memory, seeded)
    taken = [take(queue) for _ in range(4)]
    # A memory alone shows each image once; a category with two seeds is two tasks.
    assert [t.key for t in taken[:2]] == ["long (seed 0)", "memory (seed 0)"]
    assert {t.key for t in taken[2:]} == {"short (seed 0)", "short (seed 1)"}
    assert queue.take("g", 2, "n1") == WAIT
    for t in taken:
        queue.finish(FitResult(t))
    assert queue.take("g", 2, "n1") is None
    epoch = Epoch(1, 0.5, 0.5, 10.0)
    queue.report("long (seed 0)", epoch)
    assert queue.events(4) == [("long (seed 0)", epoch)]
    assert queue.events(5) == []


def test_after_a_worker_gives_up_the_others_end_their_tasks_and_no_other_starts() -> None:
    queue = make_queue(task("running", 9), task("waiting"))
    running = take(queue)
    queue.give_up("no driver")
    assert queue.take("g", 2, "n1") == WAIT
    queue.finish(FitResult(running))
    assert queue.take("g", 2, "n1") is None
    assert results(queue) == {"running": "", "waiting": "no driver"}


def test_quarantined_tasks_run_alone_and_only_the_deadly_one_fails() -> None:
    queue = make_queue(task("deadly", 9), task("healthy", 8), task("later"))
    assert [take(queue, "1").category for _ in range(2)] == ["deadly", "healthy"]
    # The group dies and is restarted: tasks that are not quarantined go first.
    later = take(queue, "2")
    assert later.category == "later"
    assert queue.take("2", 2, "n1") == WAIT
    queue.finish(FitResult(later))
    group, alone = "2", []
    while (taken := queue.take(group, 2, "n1")) is not None:
        assert isinstance(taken, FitTask), "nothing else runs, so there is no reason to wait"
        alone.append(taken.category)
        assert queue.take(group, 2, "n1") == WAIT, "a quarantined task runs alone"
        if taken.category == "deadly":
            group += "x"
        else:
            queue.finish(FitResult(taken))
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
                queue.finish(FitResult(mine))
                held[worker] = None
    assert {int(category): bool(reason) for category, reason in results(queue).items()} == {
        number: number in deadly for number in range(tasks)
    }


def test_resizing_and_lost_nodes_quarantine_no_task() -> None:
    queue = make_queue(task("a"), task("b"))
    for group, size in enumerate([1, 2, 1, 3, 2, 1]):
        for _ in range(min(size, 2)):
            take(queue, group, size)
    assert not queue.events(0)
    # Replace the spot nodes of a group one after the other; its size stays the same.
    living = {"n1", "n2"}
    queue = make_queue(task("a", 2), task("b"), living=living)
    for number in range(2, 9):
        for node in sorted(living):
            take(queue, number, 2, node)
        living.remove(f"n{number}")
        living.add(f"n{number + 1}")
    assert not queue.events(0)


def test_a_task_whose_own_node_is_lost_again_and_again_fails() -> None:
    """Its memory may take down each node on which it runs; a task on other nodes goes on."""
    living = {"other"}
    queue = make_queue(task("deadly", 2), task("healthy"), living=living)
    for number in range(MAX_NODE_LOSSES):
        living.add(f"n{number}")
        assert take(queue, number, 2, f"n{number}").category == "deadly"
        take(queue, number, 2, "other")
        living.remove(f"n{number}")
    queue.finish(FitResult(take(queue, "last", 2, "other")))
    assert queue.take("last", 2, "other") is None
    assert results(queue)["healthy"] == ""
    assert results(queue)["deadly"].startswith(f"the node that it ran on was lost {MAX_NODE_LOSSES} times")


def test_death_on_a_node_found_lost_later_does_not_count() -> None:
    living = {"n1", "n2", "n3"}
    queue = make_queue(task("a"), living=living)
    take(queue, 1, 1, "n1")
    for group, node, lost in (("2", "n2", "n1"), ("3", "n3", "n2"), ("4", "n3", "")):
        take(queue, group, 1, node)
        living.discard(lost)
    assert queue.take("5", 1, "n3") is None, "it died twice on a node that is still alive"
    assert "died 2 times" in results(queue)["a"]
