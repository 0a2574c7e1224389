"""The pool: one Ray Train run whose workers take tasks from the queue."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stpm import storage
from stpm.errors import ConfigError, StpmError
from stpm.fitting.queue import WAIT, Event, TaskQueue
from stpm.fitting.task import FitTask, Limits, Outcome, run_task
from stpm.options import option

_POLL_SECONDS = 0.3
_RESTARTS_PER_TASK = 2
_RESTARTS_OF_NODES = 3
_SHARE_OF_MEMORY = 0.5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolOptions:
    """The workers that fit.

    Raises:
        ConfigError: if a value is below what makes sense.
    """

    workers: int = option(0, "workers that fit in parallel; 0: one per GPU, or without GPUs one per CPU core")
    gpus_per_worker: float = option(1.0, "share of a GPU that a worker takes, where the cluster has GPUs; 0: use CPUs")
    cpus_per_worker: int = option(1, "CPU cores, and so threads, that a worker takes")
    memory_gib: float = option(
        0.0,
        "GiB that a worker may take for decoded images (beyond it they go to a file) and for the teacher's features "
        "(beyond it they are computed anew); 0: its share of half the node's memory",
    )
    checkpoint_seconds: float = option(
        30.0, "seconds between checkpoints of a fit, at the end of an epoch; 0: every epoch"
    )
    tensorboard: str = option(
        "", "local folder for TensorBoard's event files, one run per seed and category; none: not written"
    )

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"workers is {self.workers}; give 1 or more, or 0 to take what the cluster has")
        if self.cpus_per_worker < 1:
            raise ConfigError(f"cpus-per-worker is {self.cpus_per_worker}; give at least 1")
        if self.gpus_per_worker < 0:
            raise ConfigError(f"gpus-per-worker is {self.gpus_per_worker}; give 0 or more")
        if self.memory_gib < 0:
            raise ConfigError(f"memory-gib is {self.memory_gib}; give a number above 0, or 0 for the worker's share")
        if self.checkpoint_seconds < 0:
            raise ConfigError(f"checkpoint-seconds is {self.checkpoint_seconds}; give 0 or more")


def scaling(options: PoolOptions, resources: dict[str, float], tasks: int) -> ScalingConfig:
    """The worker group that these resources and this many tasks call for.

    Raises:
        ConfigError: if not even one worker fits.
    """
    use_gpu = resources.get("GPU", 0) > 0 and options.gpus_per_worker > 0
    fits = resources.get("CPU", 0) // options.cpus_per_worker
    if use_gpu:
        fits = min(fits, resources["GPU"] // options.gpus_per_worker)
    wanted = options.workers or int(fits)
    if wanted < 1 or (options.workers and wanted > fits):
        have = f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
        raise ConfigError(
            f"{max(wanted, 1)} workers of {options.cpus_per_worker} CPUs"
            f"{f' and {options.gpus_per_worker:g} GPUs' if use_gpu else ''} do not fit the cluster's {have}; "
            "lower --workers, --cpus-per-worker or --gpus-per-worker"
        )
    per_worker = {"CPU": float(options.cpus_per_worker)} | ({"GPU": options.gpus_per_worker} if use_gpu else {})
    return ScalingConfig(num_workers=min(wanted, tasks), use_gpu=use_gpu, resources_per_worker=per_worker)


def run_pool(
    tasks: Sequence[FitTask], options: PoolOptions, scratch: str, on_event: Callable[[Event], None]
) -> list[Outcome]:
    """Run every task on the cluster that this process is connected to.

    Args:
        tasks: what to fit, at least one.
        options: the workers.
        scratch: a URI that every node reaches, for Ray Train's own state; removed afterwards.
        on_event: called on a thread of its own for each epoch and each outcome, as they come.

    Returns:
        One outcome per task, in the order they ended. Tasks that never ran are failed.
    """
    # With the driver, and not on a node that may be taken away.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    queue = ray.remote(num_cpus=0, scheduling_strategy=here)(TaskQueue).remote(list(tasks))
    filesystem, path = storage.arrow_filesystem(scratch)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"queue": queue, "options": options},
        # Workers never speak to each other: gloo starts on every device, and on shared ones.
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=scaling(options, ray.cluster_resources(), len(tasks)),
        run_config=RunConfig(
            name=f"fit-{uuid.uuid4().hex[:8]}",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=_RESTARTS_PER_TASK * len(tasks) + _RESTARTS_OF_NODES),
        ),
    )
    follower = _Follower(queue, on_event)
    failure = ""
    try:
        trainer.fit()
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


def _work(config: dict[str, Any]) -> None:
    """The loop of one worker. A task that raises is that task's outcome, and the worker goes on."""
    queue, options = config["queue"], config["options"]
    assigned = ray.get_runtime_context().get_assigned_resources()
    torch.set_num_threads(max(int(assigned.get("CPU", 1)), 1))
    limits = _limits(options, assigned)
    group = broadcast_from_rank_zero(uuid.uuid4().hex)
    stop = threading.Event()
    while (task := ray.get(queue.take.remote(group))) is not None:
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


def _limits(options: PoolOptions, assigned: dict[str, float]) -> Limits:
    context = ray.get_runtime_context()
    node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    share = assigned.get("CPU", 1) / max(node["Resources"].get("CPU", 1), 1)
    memory = options.memory_gib * 2**30 or node["Resources"]["memory"] * _SHARE_OF_MEMORY * share
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    return Limits(
        memory=int(memory),
        device_memory=int(free * _SHARE_OF_MEMORY * min(assigned.get("GPU", 0), 1)),
        checkpoint_seconds=options.checkpoint_seconds,
    )


class _Follower:
    """Passes the queue's events on while the trainer blocks."""

    def __init__(self, queue: Any, on_event: Callable[[Event], None]) -> None:
        self._queue = queue
        self._on_event = on_event
        self._seen = 0
        self._outcomes: list[Outcome] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="fit-events", daemon=True)
        self._thread.start()

    def finish(self) -> list[Outcome]:
        self._stop.set()
        self._thread.join()
        self._drain()
        return self._outcomes

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._drain()

    def _drain(self) -> None:
        for event in ray.get(self._queue.events.remote(self._seen)):
            self._seen += 1
            if isinstance(event, Outcome):
                self._outcomes.append(event)
            self._on_event(event)
