"""Several machines: what they can reach, whether one can work, and what would run on which."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import ray
from ray.autoscaler.sdk import request_resources
from tabulate import tabulate

from stpm import storage
from stpm.cluster.connection import LEAST_CPUS, Resources, connected, is_shared, working_nodes
from stpm.errors import ConfigError, join_first
from stpm.options import ClusterOptions

log = logging.getLogger(__name__)

_POLL_SECONDS = 2.0


@contextmanager
def on_cluster(options: ClusterOptions, uris: Sequence[str]) -> Iterator[None]:
    """On a cluster that others started: connected for the time of the block, with a node that can work.

    On this machine alone nothing is started before there is something to run.

    Args:
        options: how.
        uris: what the job reads and writes.

    Raises:
        ConfigError: if not all nodes would reach a URI, or no node came.
    """
    if not is_shared():
        yield
        return
    with connected():
        check_reach(uris, options.mounted, several=_several_machines())
        if not options.plan:
            wait_for_node(options)
        yield


def check_reach(uris: Sequence[str], mounted: Sequence[str], *, several: bool) -> None:
    """Refuse local paths where several machines work, but for those that all of them mount.

    Args:
        uris: what a job reads and writes.
        mounted: local folders that every machine mounts.
        several: there are several machines.

    Raises:
        ConfigError: naming what is out of reach.
    """
    roots = [os.path.normpath(storage.absolute(folder)) for folder in mounted]
    local = [os.path.normpath(storage.absolute(uri)) for uri in uris if uri and storage.is_local(uri)]
    lost = [uri for uri in local if not any(Path(uri).is_relative_to(root) for root in roots)]
    if several and lost:
        raise ConfigError(
            f"{join_first(lost, separator=', ')}: a path of one machine, and the cluster has several; give a URI "
            "(s3://, gs://, abfs://), or name with --mounted the folder that every node mounts at the same place"
        )


def wait_for_node(options: ClusterOptions) -> None:
    """Have the autoscaler start a node, where none can work yet.

    Raises:
        ConfigError: if none came in time.
    """
    if working_nodes():
        return
    wanted = first_bundle(options.first_node)
    log.info(f"the cluster has no node that can work; asking for one with {_in_words(wanted)}")
    request_resources(bundles=[wanted])
    deadline = time.monotonic() + options.node_minutes * 60
    try:
        while not working_nodes():
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"no node with {_in_words(wanted)} came in {options.node_minutes:g} minutes; see what the "
                    "autoscaler says (ray status), or ask for another kind with --first-node"
                )
            time.sleep(_POLL_SECONDS)
    finally:
        # From here on what runs asks for what it needs.
        request_resources(bundles=[])


def first_bundle(kind: Literal["gpu", "cpu"]) -> dict[str, float]:
    """What the autoscaler is asked for."""
    return {"CPU": 1.0, "GPU": 1.0} if kind == "gpu" else {"CPU": float(LEAST_CPUS)}


def _several_machines() -> bool:
    alive = [node for node in ray.nodes() if node["Alive"]]
    return len(alive) > 1 or not working_nodes()


def _in_words(resources: Resources) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def log_plan(columns: Mapping[str, Callable[[Resources], str]]) -> None:
    """Say what each node of the cluster has and would do.

    Args:
        columns: by heading, what a node with these resources would do.
    """
    with connected():
        driver = ray.get_runtime_context().get_node_id()
        nodes = sorted((n for n in ray.nodes() if n["Alive"]), key=lambda node: node["NodeID"] != driver)
        rows = [
            [
                node["NodeManagerAddress"],
                *(f"{node['Resources'].get(kind, 0):g}" for kind in ("CPU", "GPU")),
                "driver, queue, progress" if node["NodeID"] == driver else "",
                *(does(node["Resources"]) for does in columns.values()),
            ]
            for node in nodes
        ]
        log.info(tabulate(rows, ["node", "CPUs", "GPUs", "", *columns], disable_numparse=True))
        log.info("Nodes that come later take work too. Nothing was started." if is_shared() else "Nothing was started.")
