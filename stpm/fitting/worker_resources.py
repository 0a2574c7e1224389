"""The CPUs and GPUs that each worker of a fit takes, and how many workers fit on a cluster's nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ray.train import ScalingConfig

from stpm.cluster.connection import Resources, working_nodes
from stpm.errors import ConfigError, join_first
from stpm.fitting.options import WorkerOptions

# Students are so small that they gain little from more threads.
_MAX_THREADS = 8


@dataclass(frozen=True)
class WorkerResources:
    """The CPU cores, each with one thread, and the GPUs of one worker. Workers without GPUs compute on CPUs."""

    cpus: int
    gpus: float = 0.0

    def workers_on(self, nodes: Sequence[Resources]) -> int:
        """Count the workers that fit on these nodes. A worker is never split over two of them."""
        counts = [int(node.get("CPU", 0) // self.cpus) for node in nodes]
        if self.gpus:
            # Ten tenths of a GPU are one GPU, even if the floating-point quotient is a little below 10.
            by_gpu = [int(node.get("GPU", 0) / self.gpus + 1e-9) for node in nodes]
            counts = list(map(min, counts, by_gpu))
        return sum(counts)


def choose_worker_resources(options: WorkerOptions, nodes: Sequence[Resources], task_count: int) -> WorkerResources:
    """Choose the CPUs per worker, if the options do not: as many as possible without having fewer workers.

    The tasks that an earlier run has finished count too. The number of threads affects the last bits of a student: it
    must not change when a run is resumed.
    """
    gpus = options.gpus_per_worker if any(node.get("GPU", 0) > 0 for node in nodes) else 0.0
    if options.cpus_per_worker:
        return WorkerResources(options.cpus_per_worker, gpus)
    choices = [WorkerResources(cpus, gpus) for cpus in range(_MAX_THREADS, 0, -1)]
    wanted = min(_max_workers(options, task_count), choices[-1].workers_on(nodes))
    return next((choice for choice in choices if choice.workers_on(nodes) >= wanted > 0), choices[-1])


def scaling_config(
    options: WorkerOptions, resources: WorkerResources, nodes: Sequence[Resources], task_count: int, *, elastic: bool
) -> ScalingConfig:
    """Choose the number of workers for these nodes and tasks. If elastic, it changes with the number of nodes.

    Raises:
        ConfigError: if no worker fits, or without `elastic` fewer than `options.workers` and the tasks need.
    """
    fitting = resources.workers_on(nodes)
    largest = _max_workers(options, task_count)
    wanted = largest if options.workers else min(fitting, largest)
    if fitting < 1 or (wanted > fitting and not elastic):
        have = join_first([f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes])
        raise ConfigError(
            f"{max(wanted, 1)} workers of {resources.cpus} CPUs"
            f"{f' and {resources.gpus:g} GPUs' if resources.gpus else ''} do not fit the cluster's nodes ({have}); "
            "lower --workers, --cpus-per-worker or --gpus-per-worker"
        )
    return ScalingConfig(
        num_workers=(1, largest) if elastic else wanted,
        use_gpu=resources.gpus > 0,
        resources_per_worker={"CPU": float(resources.cpus)} | ({"GPU": resources.gpus} if resources.gpus else {}),
        elastic_resize_monitor_interval_s=options.resize_seconds,
    )


def _max_workers(options: WorkerOptions, task_count: int) -> int:
    return min(options.workers or task_count, task_count)


def describe_workers(options: WorkerOptions, task_count: int, node: Resources) -> str:
    """Describe the workers that one node of the connected cluster would run; empty if none."""
    resources = choose_worker_resources(options, working_nodes(), task_count)
    count = min(resources.workers_on([node]), _max_workers(options, task_count))
    gpus = f", {resources.gpus:g} GPU" if resources.gpus else ""
    return f"{count} at once, {resources.cpus} CPUs{gpus} each" if count else ""
