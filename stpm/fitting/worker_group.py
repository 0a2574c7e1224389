"""The pool: one Ray Train run whose workers take tasks from the queue."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from stpm import storage
from stpm.cluster.connection import KEEPING_MEMORY, Resources, beside_the_driver, is_shared, living_nodes, working_nodes
from stpm.errors import ConfigError, StpmError, join_first
from stpm.fitting.options import PoolOptions
from stpm.fitting.task import FitTask, Outcome
from stpm.fitting.task_queue import WAIT, Event, TaskQueue

_POLL_SECONDS = 0.3
_LOST_SECONDS = 5.0
_RESTARTS_PER_TASK = 2
_RESTARTS_BESIDES = 3
_SHARE_OF_MEMORY = 0.5
# A student this small gains little from more.
_MOST_THREADS = 8

log = logging.getLogger(__name__)


def shared_out(options: PoolOptions, nodes: Sequence[Resources], tasks: int) -> PoolOptions:
    """The options with the CPUs that a worker takes, where they leave that open.

    The number of threads has a part in the last bits of a student. So `tasks` counts what a run is asked for, and not
    what is left of it after an interruption.
    """
    if options.cpus_per_worker:
        return options
    wanted = options.workers or tasks
    use_gpu = _use_gpu(options, nodes)
    most = _places(options, nodes, 1, use_gpu)
    for cpus in range(_MOST_THREADS, 1, -1):
        if _places(options, nodes, cpus, use_gpu) >= min(wanted, most) > 0:
            return dataclasses.replace(options, cpus_per_worker=cpus)
    return dataclasses.replace(options, cpus_per_worker=1)


def scaling(options: PoolOptions, nodes: Sequence[Resources], tasks: int, *, grows: bool) -> ScalingConfig:
    """The worker group that these nodes and this many tasks call for.

    Args:
        options: with the CPUs that a worker takes.
        nodes: what each node has, of those that take work.
        tasks: what there is to do.
        grows: nodes may come and go: the group goes on with those that are there, and takes in others.

    Raises:
        ConfigError: if not even one worker fits, or not as many as are wanted.
    """
    use_gpu = _use_gpu(options, nodes)
    fits = _places(options, nodes, options.cpus_per_worker, use_gpu)
    wanted = options.workers or fits
    if fits < 1 or (wanted > fits and not grows):
        have = join_first([f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes])
        raise ConfigError(
            f"{max(wanted, 1)} workers of {options.cpus_per_worker} CPUs"
            f"{f' and {options.gpus_per_worker:g} GPUs' if use_gpu else ''} do not fit the cluster's nodes ({have}); "
            "lower --workers, --cpus-per-worker or --gpus-per-worker"
        )
    per_worker = {"CPU": float(options.cpus_per_worker)} | ({"GPU": options.gpus_per_worker} if use_gpu else {})
    if not grows:
        return ScalingConfig(num_workers=min(wanted, tasks), use_gpu=use_gpu, resources_per_worker=per_worker)
    return ScalingConfig(
        num_workers=(1, min(options.workers or tasks, tasks)),
        use_gpu=use_gpu,
        resources_per_worker=per_worker,
        elastic_resize_monitor_interval_s=options.resize_seconds,
    )


def _use_gpu(options: PoolOptions, nodes: Sequence[Resources]) -> bool:
    return options.gpus_per_worker > 0 and any(node.get("GPU", 0) > 0 for node in nodes)


def _places(options: PoolOptions, nodes: Sequence[Resources], cpus: int, use_gpu: bool) -> int:
    """How many workers of so many CPUs the nodes hold: a worker is never split over two."""
    places = [int(node.get("CPU", 0) // cpus) for node in nodes]
    if use_gpu:
        shares = [int(node.get("GPU", 0) / options.gpus_per_worker + 1e-9) for node in nodes]
        places = [min(pair) for pair in zip(places, shares, strict=True)]
    return sum(places)


def planned(options: PoolOptions, nodes: Sequence[Resources], tasks: int, node: Resources) -> str:
    """What would be fitted on a node of these, in words."""
    shared = shared_out(options, nodes, tasks)
    places = min(_places(shared, [node], shared.cpus_per_worker, _use_gpu(options, nodes)), shared.workers or tasks)
    gpus = f", {options.gpus_per_worker:g} GPU" if _use_gpu(options, nodes) else ""
    return f"{places} at once, {shared.cpus_per_worker} CPUs{gpus} each" if places else ""


def run_pool(
    tasks: Sequence[FitTask], options: PoolOptions, scratch: str, on_event: Callable[[Event], None]
) -> list[Outcome]:
    """Run every task on the cluster that this process is connected to.

    Args:
        tasks: what to fit, at least one.
        options: the workers, with the CPUs that each takes.
        scratch: a URI that every node reaches, for Ray Train's own state; removed afterwards.
        on_event: called on a thread of its own for each epoch and each outcome, as they come.

    Returns:
        One outcome per task, in the order they ended. Tasks that never ran are failed.
    """
    workers = scaling(options, working_nodes(), len(tasks), grows=is_shared())
    actor = ray.remote(num_cpus=0, scheduling_strategy=beside_the_driver())(TaskQueue)
    queue = actor.remote(list(tasks), living_nodes)
    filesystem, path = storage.arrow_filesystem(scratch)

    def train() -> None:
        TorchTrainer(
            _work,
            train_loop_config={"queue": queue, "options": options},
            # Workers never speak to each other: gloo starts on every device, and on shared ones.
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=workers,
            run_config=RunConfig(
                name=f"fit-{uuid.uuid4().hex[:8]}",
                storage_path=path,
                worker_runtime_env=KEEPING_MEMORY,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=_RESTARTS_PER_TASK * len(tasks) + _RESTARTS_BESIDES),
            ),
        ).fit()

    follower = _Follower(queue, on_event)
    failure = ""
    try:
        again_while_nodes_are_lost(train, follower.lost_nodes)
    except ray.train.TrainingFailedError as error:
        failure = f"the worker group could not go on: {str(error).splitlines()[0]}"
        log.exception("Ray Train gave up")
    finally:
        outcomes = follower.finish()
        ray.kill(queue)
        storage.remove(scratch)
    ended = {outcome.key for outcome in outcomes}
    missing = [Outcome.failed(task, failure or "it never ran") for task in tasks if task.key not in ended]
    for outcome in missing:
        on_event(outcome)
    return outcomes + missing


def again_while_nodes_are_lost(train: Callable[[], None], lost_nodes: Callable[[], int]) -> None:
    """Train until it ends, or fails though no node was lost since it began.

    Ray Train takes a node that is gone without a word for a failure of its workers, and gives up after some of those;
    of spot nodes there may be any number.

    Args:
        train: goes on where the last call ended.
        lost_nodes: how many nodes have been lost so far.

    Raises:
        TrainingFailedError: as `train` does.
    """
    while True:
        before = lost_nodes()
        try:
            train()
        except ray.train.TrainingFailedError:
            if lost_nodes() == before:
                raise
            log.warning("Ray Train gave up after nodes were lost; it starts anew")
        else:
            return


def _work(config: dict[str, Any]) -> None:
    """The loop of one worker. A task that raises is that task's outcome, and the worker goes on."""
    # Ray Train's controller unpickles this too, and would wait for the import of what it never runs.
    from stpm.fitting.fit_category import Limits, run_task

    queue, options = config["queue"], config["options"]
    assigned = ray.get_runtime_context().get_assigned_resources()
    torch.set_num_threads(max(int(assigned.get("CPU", 1)), 1))
    memory, device_memory = _memory(options, assigned)
    limits = Limits(memory, device_memory, options.checkpoint_seconds)
    group = broadcast_from_rank_zero(uuid.uuid4().hex)
    size, node = ray.train.get_context().get_world_size(), ray.get_runtime_context().get_node_id()
    stop = threading.Event()
    while (task := ray.get(queue.take.remote(group, size, node))) is not None:
        if task == WAIT:
            stop.wait(_POLL_SECONDS)
            continue
        try:
            outcome = run_task(task, limits, partial(queue.report.remote, task.key))
        except StpmError as error:
            outcome = Outcome.failed(task, str(error))
        except Exception as error:
            log.exception("%s failed", task.key)
            outcome = Outcome.failed(task, f"{type(error).__name__}: {error}")
        ray.get(queue.finish.remote(outcome))


def _memory(options: PoolOptions, assigned: dict[str, float]) -> tuple[int, int]:
    """Bytes of this worker's node, and of its device, that it may take."""
    context = ray.get_runtime_context()
    node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    share = assigned.get("CPU", 1) / max(node["Resources"].get("CPU", 1), 1)
    memory = options.memory_gib * 2**30 or node["Resources"]["memory"] * _SHARE_OF_MEMORY * share
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    return int(memory), int(free * _SHARE_OF_MEMORY * min(assigned.get("GPU", 0), 1))


def _release_lost() -> None:
    """Give up the places of worker groups that lost a node.

    A group that loses one while it starts is given up by Ray Train, and not its placement group: that goes on holding
    what its other nodes have, and no group ever starts again. A group that runs is started anew anyway.
    """
    job = ray.get_runtime_context().get_job_id()
    for name, of in placement_group_table().items():
        # An id ends in that of the job that it belongs to.
        if name.endswith(job) and of["state"] == "RESCHEDULING":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


class _Follower:
    """Passes the queue's events on while the trainer blocks."""

    def __init__(self, queue: Any, on_event: Callable[[Event], None]) -> None:
        self._queue = queue
        self._on_event = on_event
        self._seen = 0
        self._outcomes: list[Outcome] = []
        self._nodes = living_nodes()
        self._lost: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="fit-events", daemon=True)
        self._thread.start()

    def lost_nodes(self) -> int:
        """How many nodes were there, and are no more."""
        living = living_nodes()
        self._nodes |= living
        self._lost |= self._nodes - living
        return len(self._lost)

    def finish(self) -> list[Outcome]:
        self._stop.set()
        self._thread.join()
        self._drain()
        return self._outcomes

    def _follow(self) -> None:
        looked = time.monotonic()
        while not self._stop.wait(_POLL_SECONDS):
            self._drain()
            if time.monotonic() - looked > _LOST_SECONDS:
                looked = time.monotonic()
                self.lost_nodes()
                _release_lost()

    def _drain(self) -> None:
        for event in ray.get(self._queue.events.remote(self._seen)):
            self._seen += 1
            if isinstance(event, Outcome):
                self._outcomes.append(event)
            self._on_event(event)
