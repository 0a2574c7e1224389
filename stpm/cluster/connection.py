"""The connection to Ray: an existing cluster where `RAY_ADDRESS` names one, else one of this process's own."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import ceil
from pathlib import Path

# Read by Ray Train when it is imported: with its default a fit takes ten seconds longer to end.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
# The same, of starting a group of workers, some of whose nodes may be gone by then: it is tried again, and again.
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
# Ray's C++ core writes to this process's own standard error; at its default it warns on every pool of actors.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

# Of a cluster that this process starts. At its default Ray ends what is idle for a second and more than one process per
# core, and the next task of that kind imports everything again.
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")

import ray
from ray.data import DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stpm.console import stop_on_signals

LEAST_CPUS = 2

Resources = Mapping[str, float]

# For processes that compute on a CPU. At its defaults the C library gives every large tensor back to the kernel and
# takes a new one, and the kernel clears each page again: up to half of the time of a forward pass or a training step.
# It reads these when a process starts, so they are part of the environment that Ray starts a worker in.
KEEPING_MEMORY = {
    "env_vars": {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
    }
}


def beside_the_driver() -> NodeAffinitySchedulingStrategy:
    """Where a driver's own actors run: not on a node that may be taken away. A soft affinity is not kept reliably."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def working_nodes() -> list[Resources]:
    """What each node of the connected cluster has, of those that take work: a head without CPUs does not."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]


def living_nodes() -> set[str]:
    """Ids of the nodes that are alive; a node that was lost is missed after a while."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def is_shared() -> bool:
    """Whether the connected cluster is one that others started: its nodes may come and go."""
    return bool(os.environ.get("RAY_ADDRESS"))


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may use: of those that it is bound to, as many as its control groups let it.

    Args:
        root: where /proc and /sys are, for tests.
    """
    return max(min(len(os.sched_getaffinity(0)), *(ceil(limit) for limit in _cpu_limits(root))), 1)


def _cpu_limits(root: Path) -> Iterator[float]:
    """What each control group over this process allows, in CPUs; those that limit nothing are left out.

    In a container the group of the process is often the root of what can be seen.
    """
    yield float(2**31)
    groups = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            tree = groups
        elif "cpu" in controllers.split(","):
            tree = groups / "cpu"
        else:
            continue
        group = tree / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(tree) and (limit := _cpu_limit(folder)):
                yield limit


def _cpu_limit(folder: Path) -> float | None:
    """Of one control group, of version 2 or 1: microseconds of CPU time that it may take per microseconds."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError):
        return None


@contextmanager
def connected() -> Iterator[None]:
    """Connected to Ray for the time of the block; a connection that was there before is left as it was."""
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    with _standard_error_dropped():
        if is_shared():
            ray.init(**quiet)
        else:
            # The scoring pipeline needs a CPU beside the one that its scorer takes, so one core counts as two.
            ray.init(address="local", num_cpus=max(usable_cpus(), LEAST_CPUS), include_dashboard=False, **quiet)
    # Ray put its own handler in the place of ours.
    stop_on_signals()
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # They advise the author of a pipeline, in the middle of its user's log.
    context.issue_detectors_config.detectors = []
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _standard_error_dropped() -> Iterator[None]:
    """Drop what this process writes to standard error, whatever its level.

    Ray's C++ core says its log level there when it starts, as the first line that a user would see. What goes wrong is
    an exception besides.
    """
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
