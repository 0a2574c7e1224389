"""The connection to Ray: to the cluster at `RAY_ADDRESS` if it is set, otherwise to a new one on this machine."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stpm.cluster.cpus import usable_cpus
from stpm.console import stop_on_signals
from stpm.errors import ConfigError
from stpm.names import hide_urls

# A scorer and the tasks of the other stages share them; fewer are not tested.
MIN_CPUS = 2

# Bytes that Ray's files take at its start, and more.
_MIN_FREE = 64 * 2**20

Resources = Mapping[str, float]

# Read by Ray when a connection is made, and by Ray Train when it starts a run.
_RAY_SETTINGS = {
    # With the default, a fit takes ten seconds longer to end.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Start a group of workers again, sooner than by default, if it does not start because a node is gone.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    # Ray's C++ core writes to standard error. With the default it warns about every pool of actors.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # For a cluster that this process starts. By default, beyond one process per core, Ray ends those that are idle for
    # a second, and the next task of that kind imports everything again.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
}

# Also for a cluster that this process starts.
_OWN_SETTINGS = {
    # Ray Train's cleaner of placement groups asks the dashboard for the state of actors (ray-project/ray#58515). There
    # is none, and another cluster's would not know the actors. Unless the connection is refused at once, as it is at
    # this address, the cleaner waits, and a fit ends 12 s later.
    "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9",
    # The only node is never about to leave: no actor, with a second of imports, need watch for that.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


@contextmanager
def connected() -> Iterator[None]:
    """Connect to Ray for the duration of the block; an existing connection is used, and kept.

    Raises:
        ConfigError: if Ray cannot be started or reached.
    """
    if ray.is_initialized():
        yield
        return
    _connect()
    try:
        yield
    finally:
        ray.shutdown()


def _connect() -> None:
    # Its import takes a second: tasks and actors that import this module do without it.
    from ray.data import DataContext

    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with _discard_stderr():
            if is_shared():
                ray.init(**quiet)
            else:
                os.environ.update(_OWN_SETTINGS)
                ray.init(address="local", num_cpus=max(usable_cpus(), MIN_CPUS), include_dashboard=False, **quiet)
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        # Ray's own handler raised it; now this package's has the signal.
        stop_on_signals()
        signal.raise_signal(signal.SIGTERM)
    except (RayError, RuntimeError, ValueError, ConnectionError) as error:
        address = os.environ.get("RAY_ADDRESS", "")
        where = f"the Ray cluster at RAY_ADDRESS={address} cannot be reached" if address else "Ray cannot start"
        message = f"{where}: {' '.join(str(error).split())}"
        if shutil.disk_usage(folder := tempfile.gettempdir()).free < _MIN_FREE:
            message += f"; {folder} is full: make room there, or set TMPDIR and RAY_TMPDIR to a larger disk"
        raise ConfigError(hide_urls(message) if "@" in address else message) from error
    # Ray has replaced the handler.
    stop_on_signals()
    for name, level in (("train", "WARNING"), ("data", "WARNING"), ("data._internal.progress", "ERROR")):
        logging.getLogger(f"ray.{name}").setLevel(level)
    # What it would log is raised, too: see `interrupted_by_ray`.
    logging.getLogger("ray.data.exceptions").setLevel("CRITICAL")
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # They advise the author of a pipeline, and would do so in the user's log.
    context.issue_detectors_config.detectors = []


@contextmanager
def _discard_stderr() -> Iterator[None]:
    """Discard what this process writes to standard error, by descriptor.

    Ray's C++ core writes a line about its log level when it starts, at any log level. Errors become exceptions anyway.
    """
    kept = os.dup(2)
    with Path(os.devnull).open("w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def is_shared() -> bool:
    """Return whether the cluster was started by others: its nodes may come and go."""
    return bool(os.environ.get("RAY_ADDRESS"))


def working_nodes() -> list[Resources]:
    """Return the resources of each live node that can run tasks; a head without CPUs cannot."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]


def living_nodes() -> set[str]:
    """Return the ids of the live nodes; Ray notices after some seconds that a node is lost."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def on_driver_node() -> NodeAffinitySchedulingStrategy:
    """Schedule an actor on the driver's node, which outlives the others. Ray may ignore a soft affinity."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
