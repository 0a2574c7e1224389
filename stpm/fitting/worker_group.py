"""Run the tasks of a fit: one Ray Train worker group, whose workers take tasks from the queue."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from stpm import storage
from stpm.cluster.connection import is_shared, living_nodes, on_driver_node, working_nodes
from stpm.cluster.device import KEEP_FREED_MEMORY, assigned_device
from stpm.cluster.ray_failures import how_to_continue
from stpm.errors import DeviceError, last_line
from stpm.fitting.options import WorkerOptions
from stpm.fitting.task import Event, FitResult, FitTask
from stpm.fitting.task_queue import WAIT, TaskQueue
from stpm.fitting.worker_resources import WorkerResources, scaling_config
from stpm.method.arithmetic import Arithmetic

_POLL_SECONDS = 0.3
_NODE_CHECK_SECONDS = 5.0
# Restarts of the worker group: a task may kill its worker twice, and a few restarts may have other causes.
_RESTARTS_PER_TASK = 2
_EXTRA_RESTARTS = 3

log = logging.getLogger(__name__)


def run_worker_group(
    tasks: Sequence[FitTask],
    options: WorkerOptions,
    resources: WorkerResources,
    arithmetic: Arithmetic,
    scratch: str,
    on_event: Callable[[Event | None], None],
) -> list[FitResult]:
    """Run all tasks on the connected cluster.

    Args:
        tasks: one or more.
        options: number of the workers, their RAM, and the time between checkpoints.
        resources: the CPU cores and GPUs that one worker takes.
        scratch: URI that every node can reach, for Ray Train's own files. It is removed at the end.
        on_event: called with each event, and with None while there are none, on one thread that is not the caller's.

    Returns:
        One result per task, in the order in which they ended. Tasks that never ran have failed.

    Raises:
        ConfigError: if the workers do not fit the cluster.
    """
    scaling = scaling_config(options, resources, working_nodes(), len(tasks), elastic=is_shared())
    queue = ray.remote(num_cpus=0, scheduling_strategy=on_driver_node())(TaskQueue).remote(list(tasks), living_nodes)
    filesystem, path = storage.arrow_filesystem(scratch)

    def train() -> None:
        _Trainer(
            _run_worker,
            train_loop_config={"queue": queue, "options": options, "arithmetic": arithmetic},
            scaling_config=scaling,
            run_config=RunConfig(
                name=f"fit-{uuid.uuid4().hex[:8]}",
                storage_path=path,
                # Ray Train calls `_run_worker` in a thread of its own.
                worker_runtime_env=KEEP_FREED_MEMORY,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=_RESTARTS_PER_TASK * len(tasks) + _EXTRA_RESTARTS),
            ),
        ).fit()

    monitor = _Monitor(queue, on_event)
    failure = ""
    try:
        retry_after_node_loss(train, monitor.count_lost_nodes)
    except ray.train.TrainingFailedError as error:
        remedy = how_to_continue(error, "Ray Train gave up")
        failure = f"the worker group could not go on: {last_line(error)}; {remedy}"
    finally:
        try:
            results = monitor.stop()
        finally:
            ray.kill(queue)
            try:
                storage.remove(scratch)
            except OSError as error:
                # The models are published, and the next fit removes it.
                log.warning(f"Ray Train's own files are left: {error}")
    ended = {result.task.key for result in results}
    missing = [
        FitResult(task, reason=failure or "not started, because the workers ended; run the same command again")
        for task in tasks
        if task.key not in ended
    ]
    for result in missing:
        on_event(result)
    return results + missing


class _Trainer(DataParallelTrainer):  # type: ignore[misc]
    """Start workers that never communicate: a TorchTrainer connects them, and its controller imports torch.

    Leave SIGINT to the job: Ray Train's own handler ends the process without a word, and with another exit code.
    """

    def _register_sigint_handler(self, controller: object) -> None:
        pass


def retry_after_node_loss(train: Callable[[], None], count_lost_nodes: Callable[[], int]) -> None:
    """Train, and train again while it fails after the loss of a node.

    Ray Train counts the loss of a node as a failure of the workers, and gives up after `max_failures`. But any number
    of spot nodes may be lost.

    Args:
        train: continues where its last call ended.
        count_lost_nodes: returns the number of nodes lost so far.

    Raises:
        TrainingFailedError: if `train` raises it, and no node was lost meanwhile.
    """
    while True:
        lost_before = count_lost_nodes()
        try:
            train()
        except ray.train.TrainingFailedError:
            if count_lost_nodes() == lost_before:
                raise
            log.warning("Ray Train gave up after nodes were lost; it is started again")
        else:
            return


def _run_worker(config: dict[str, Any]) -> None:
    """Take tasks from the queue until all have ended, or this worker's GPU cannot be used: then end the queue."""
    # Ray Train's controller unpickles this function too: it would spend seconds on imports that it never uses.
    from stpm.fitting.fit_category import WorkerSettings, fit_category

    queue, context = config["queue"], ray.get_runtime_context()
    try:
        settings = WorkerSettings.of_this_worker(config["options"], config["arithmetic"], assigned_device())
        group = broadcast_from_rank_zero(uuid.uuid4().hex)
        size, node = ray.train.get_context().get_world_size(), context.get_node_id()
        while (task := ray.get(queue.take.remote(group, size, node))) is not None:
            if task == WAIT:
                time.sleep(_POLL_SECONDS)
                continue
            result = fit_category(task, settings, partial(queue.report.remote, task.key))
            ray.get(queue.finish.remote(replace(result, node=ray.util.get_node_ip_address())))
            if not result.record:
                # With a lost GPU every other task would fail too.
                assigned_device()
    except DeviceError as error:
        ray.get(queue.give_up.remote(str(error)))


def _remove_stuck_placement_groups() -> None:
    """Remove this job's placement groups that wait for a lost node.

    If a worker group loses a node while it starts, Ray Train abandons it and does not remove its placement group. This
    keeps the resources of the other nodes, and no new group can start. Ray Train restarts a group that was running.
    """
    job = ray.get_runtime_context().get_job_id()
    for group_id, group in placement_group_table().items():
        # The id of a placement group ends with the id of its job.
        if group_id.endswith(job) and group["state"] == "RESCHEDULING":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))


class _Monitor:
    """Pass on the queue's events and watch for lost nodes, in a thread, while Ray Train blocks the main thread."""

    def __init__(self, queue: Any, on_event: Callable[[Event | None], None]) -> None:
        self._queue = queue
        self._on_event = on_event
        self._event_count = 0
        self._results: list[FitResult] = []
        self._known_nodes = living_nodes()
        self._lost_nodes: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fit-events", daemon=True)
        self._thread.start()

    def count_lost_nodes(self) -> int:
        """Count the nodes that were seen alive once and were dead later."""
        living = living_nodes()
        self._known_nodes |= living
        self._lost_nodes |= self._known_nodes - living
        return len(self._lost_nodes)

    def stop(self) -> list[FitResult]:
        """Stop the thread, pass on the last events, and return all results."""
        self._stop.set()
        self._thread.join()
        self._pass_on_events()
        return self._results

    def _run(self) -> None:
        last_check = time.monotonic()
        # If Ray lost the queue, `stop` raises the error again.
        with suppress(RayError):
            while not self._stop.wait(_POLL_SECONDS):
                self._pass_on_events()
                if time.monotonic() - last_check > _NODE_CHECK_SECONDS:
                    last_check = time.monotonic()
                    self.count_lost_nodes()
                    _remove_stuck_placement_groups()

    def _pass_on_events(self) -> None:
        for event in ray.get(self._queue.events.remote(self._event_count)):
            self._event_count += 1
            if isinstance(event, FitResult):
                self._results.append(event)
            self._on_event(event)
        self._on_event(None)
