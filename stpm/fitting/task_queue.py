"""The queue from which workers take tasks, longest first. It does not import Ray.

When a worker process dies, Ray Train restarts the whole worker group, and does not report which worker died. The queue
quarantines every task that was running: it runs each alone. If its worker dies again, the task has failed.

A restart counts as a death only if the group has as many workers as before and all its nodes are still alive.
Otherwise the group was resized or a node was lost, such as a spot instance: its tasks go back to the queue. A task
whose own node is lost again and again has failed too: it may take the memory of the whole node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Literal

from stpm.fitting.task import Epoch, Event, FitResult, FitTask

WAIT: Literal["wait"] = "wait"
# Spot instances may be lost often, but the same task is seldom on each of them.
MAX_NODE_LOSSES = 10


class TaskQueue:
    """The tasks that wait, are quarantined or run, and the events of all tasks. It lives in one actor.

    `living_nodes` returns the ids of the nodes that are alive now.
    """

    def __init__(self, tasks: Sequence[FitTask], living_nodes: Callable[[], Collection[str]]) -> None:
        self._living_nodes = living_nodes
        self._waiting = sorted(tasks, key=lambda task: task.cost)
        self._quarantined: list[FitTask] = []
        # By task key, with the id of the node that it runs on.
        self._running: dict[str, tuple[FitTask, str]] = {}
        self._node_losses: Counter[str] = Counter()
        # For each task key, the nodes of the worker group at each of its deaths.
        self._deaths: dict[str, list[set[str]]] = {}
        self._group = ""
        self._group_size = 0
        self._group_nodes: set[str] = set()
        self._events: list[Event] = []

    def take(self, group: str, size: int, node: str) -> FitTask | Literal["wait"] | None:
        """Return a task for a worker, "wait" if there may be one later, or None if all tasks have ended.

        The worker's group, of this size, has a new id at each start: a new id means that the previous group has ended.
        """
        if group != self._group:
            self._end_group(size)
            self._group, self._group_size, self._group_nodes = group, size, set()
        self._group_nodes.add(node)
        quarantined_task_runs = any(key in self._deaths for key in self._running)
        if self._waiting and not quarantined_task_runs:
            task = self._waiting.pop()
        elif self._quarantined and not self._running:
            task = self._quarantined.pop()
        else:
            return WAIT if self._waiting or self._quarantined or self._running else None
        self._running[task.key] = task, node
        return task

    def report(self, key: str, message: Epoch | str) -> None:
        """Record a finished epoch or a message of a task."""
        self._events.append((key, message))

    def finish(self, result: FitResult) -> None:
        """Record the result of a task."""
        self._running.pop(result.task.key, None)
        self._events.append(result)

    def give_up(self, reason: str) -> None:
        """Let all tasks fail that do not run."""
        self._events += [FitResult(task, reason=reason) for task in self._waiting + self._quarantined]
        self._waiting, self._quarantined = [], []

    def events(self, since: int) -> list[Event]:
        """Return all events from number `since` on."""
        return self._events[since:]

    def _end_group(self, new_size: int) -> None:
        """Put the tasks of a group that has ended into quarantine, or back into the queue."""
        living = set(self._living_nodes())
        if new_size == self._group_size and self._group_nodes <= living:
            self._quarantine_running(living)
        else:
            self._waiting += [task for task, node in self._running.values() if self._survives(task, node in living)]
            self._waiting.sort(key=lambda task: task.cost)
        self._running.clear()

    def _survives(self, task: FitTask, node_lives: bool) -> bool:
        """Count the losses of the node that a task ran on; end it after too many."""
        self._node_losses[task.key] += not node_lives
        if self._node_losses[task.key] < MAX_NODE_LOSSES:
            return True
        reason = (
            f"the node that it ran on was lost {MAX_NODE_LOSSES} times (out of memory?); run again with a lower "
            "--batch-size, --pixels or --workers"
        )
        self._events.append(FitResult(task, reason=reason))
        return False

    def _quarantine_running(self, living: set[str]) -> None:
        ran_alone = len(self._running) == 1
        for key, (task, _) in self._running.items():
            # Ray may notice the loss of a node after that of its workers: check earlier deaths again.
            deaths = [nodes for nodes in self._deaths.get(key, ()) if nodes <= living] + [self._group_nodes]
            self._deaths[key] = deaths
            if len(deaths) > 1 and ran_alone:
                reason = (
                    f"its worker process died {len(deaths)} times (out of memory?); run again with a lower "
                    "--batch-size, --pixels or --workers"
                )
                self._events.append(FitResult(task, reason=reason))
            else:
                self._quarantined.append(task)
