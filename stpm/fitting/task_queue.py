"""The queue that a pool of workers takes its tasks from, longest first.

When a worker process dies, Ray Train restarts the whole group, and every task that was running is suspect, though
at most one is guilty. So a suspect runs again alone; one that then dies in company of nobody is set aside.
A death counts only where all nodes of the group live on: a node that was lost, a spot instance that was taken away,
explains it. A group that comes back with another number of workers was resized, and no task is to blame either.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

from stpm.fitting.task import Epoch, FitTask, Outcome

# What a task told of itself (an epoch, or words), or how it ended.
Event = tuple[str, Epoch | str] | Outcome

WAIT: Literal["wait"] = "wait"


class TaskQueue:
    """Tasks, who runs them, and how they ended. Lives in one actor; knows no Ray.

    Args:
        tasks: what there is to do.
        living_nodes: ids of the nodes that are alive now.
    """

    def __init__(self, tasks: Sequence[FitTask], living_nodes: Callable[[], Collection[str]]) -> None:
        self._living_nodes = living_nodes
        self._waiting = sorted(tasks, key=lambda task: task.cost)
        self._suspects: list[FitTask] = []
        self._running: dict[str, FitTask] = {}
        # By task: for each group that ended while it ran, the nodes of that group.
        self._deaths: dict[str, list[set[str]]] = {}
        self._group = ""
        self._size = 0
        self._nodes: set[str] = set()
        self._events: list[Event] = []

    def take(self, group: str, size: int, node: str) -> FitTask | Literal["wait"] | None:
        """A task for a worker of a group, "wait" if there may be one later, None if all are done.

        Args:
            group: names one start of the worker group; a new name says that the last one ended.
            size: number of workers in the group.
            node: id of the worker's node.
        """
        if group != self._group:
            if size == self._size and self._nodes.issubset(self._living_nodes()):
                self._suspect_running()
            else:
                self._put_back_running()
            self._group, self._size, self._nodes = group, size, set()
        self._nodes.add(node)
        if self._waiting and not self._alone():
            task = self._waiting.pop()
        elif self._suspects and not self._running:
            task = self._suspects.pop()
        else:
            return WAIT if self._waiting or self._suspects or self._running else None
        self._running[task.key] = task
        return task

    def report(self, key: str, told: Epoch | str) -> None:
        self._events.append((key, told))

    def finish(self, outcome: Outcome) -> None:
        self._running.pop(outcome.key, None)
        self._events.append(outcome)

    def events(self, since: int) -> list[Event]:
        """What happened, from the event number `since` on."""
        return self._events[since:]

    def _alone(self) -> bool:
        return any(key in self._deaths for key in self._running)

    def _put_back_running(self) -> None:
        self._waiting = sorted([*self._waiting, *self._running.values()], key=lambda task: task.cost)
        self._running.clear()

    def _suspect_running(self) -> None:
        alone = len(self._running) == 1
        living = set(self._living_nodes())
        for key, task in self._running.items():
            # A node may be missed only after its workers are: look again at those of earlier deaths.
            deaths = [nodes for nodes in self._deaths.get(key, ()) if nodes <= living] + [self._nodes]
            self._deaths[key] = deaths
            if len(deaths) > 1 and alone:
                reason = f"its worker process died {len(deaths)} times (out of memory?); it was set aside"
                self._events.append(Outcome.failed(task, reason))
            else:
                self._suspects.append(task)
        self._running.clear()
