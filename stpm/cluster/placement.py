"""Several machines: which paths they can reach, whether one can work, and what each would run."""

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
from stpm.cluster.connection import MIN_CPUS, Resources, connected, is_shared, living_nodes, working_nodes
from stpm.console import log_lines
from stpm.errors import HOW_TO_CONTINUE, ConfigError, RunInterruptedError, join_first
from stpm.options import ClusterOptions

log = logging.getLogger(__name__)

_POLL_SECONDS = 2.0


@contextmanager
def on_cluster(options: ClusterOptions, uris: Sequence[str]) -> Iterator[None]:
    """Connect to a shared cluster for the duration of the block, and wait until a node can work.

    Without a shared cluster, do nothing: Ray is started when there is something to run.

    Raises:
        ConfigError: if some nodes cannot reach one of the URIs that the job reads and writes, or no node came in time.
    """
    if not is_shared():
        yield
        return
    with connected():
        # A head without CPUs means that workers come on demand.
        if len(living_nodes()) > 1 or not working_nodes():
            check_reach(uris, options.mounted)
        if not options.plan:
            wait_for_nodes(options)
        yield


def check_reach(uris: Sequence[str], mounted: Sequence[str]) -> None:
    """Refuse local paths on several machines, except under folders that all of them mount.

    Raises:
        ConfigError: if some machines cannot reach a path. Empty URIs are ignored.
    """
    roots = [os.path.normpath(storage.absolute(folder)) for folder in mounted]
    local = [os.path.normpath(storage.absolute(uri)) for uri in uris if uri and storage.is_local(uri)]
    unreachable = [uri for uri in local if not any(Path(uri).is_relative_to(root) for root in roots)]
    if unreachable:
        raise ConfigError(
            f"{join_first(unreachable, separator=', ')}: a path of one machine, and the cluster has several; give a "
            "URI (s3://, gs://, abfs://), or name with --mounted the folder that every node mounts at the same place"
        )


def wait_for_nodes(options: ClusterOptions) -> list[Resources]:
    """Return the resources of the nodes that can work.

    If there are none, or none of the kind that the options name, ask the autoscaler for one, and wait for it.

    Raises:
        ConfigError: if none came in time.
    """
    if nodes := _nodes_with(options.first_node):
        return nodes
    bundle = first_bundle(options.first_node)
    wanted = " and ".join(f"{amount:g} {resource}" for resource, amount in bundle.items())
    log.info(f"the cluster has no node with {wanted}; asking for one")
    deadline = time.monotonic() + options.node_minutes * 60
    try:
        while not (nodes := _nodes_with(options.first_node)):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"no node with {wanted} came in {options.node_minutes:g} minutes; see the autoscaler's report "
                    "(ray status), or ask for another kind with --first-node"
                )
            # Again and again: Ray's `AutoscalingCoordinator`, which other jobs leave behind, replaces the request.
            request_resources(bundles=[bundle])
            time.sleep(_POLL_SECONDS)
        return nodes
    finally:
        # Tasks and actors now ask for what they need.
        request_resources(bundles=[])


def nodes_for_plan(options: ClusterOptions) -> list[Resources]:
    """As `wait_for_nodes`, before each plan of a run that has begun: the autoscaler removes idle nodes meanwhile.

    Raises:
        RunInterruptedError: if no node came in time.
    """
    try:
        return wait_for_nodes(options)
    except ConfigError as error:
        raise RunInterruptedError(f"{error}; {HOW_TO_CONTINUE}") from error


def log_plan(columns: Mapping[str, Callable[[Resources], str]]) -> None:
    """Log a table of the cluster's nodes: their resources, and what each would run.

    Args:
        columns: by heading, a function from a node's resources to what it would run.
    """
    with connected():
        driver = ray.get_runtime_context().get_node_id()
        rows = [
            [
                node["NodeManagerAddress"],
                *(f"{node['Resources'].get(kind, 0):g}" for kind in ("CPU", "GPU")),
                "driver" if node["NodeID"] == driver else "",
                *(describe(node["Resources"]) for describe in columns.values()),
            ]
            for node in sorted(ray.nodes(), key=lambda node: node["NodeID"] != driver)
            if node["Alive"]
        ]
        log_lines(tabulate(rows, ["node", "CPUs", "GPUs", "", *columns], disable_numparse=True))
        log.info("Nodes that come later take work too. Nothing was started." if is_shared() else "Nothing was started.")


def first_bundle(kind: Literal["any", "gpu", "cpu"]) -> dict[str, float]:
    """Return the resources to ask the autoscaler for."""
    return {"CPU": float(MIN_CPUS)} if kind == "cpu" else {"CPU": 1.0, "GPU": 1.0}


def _nodes_with(kind: Literal["any", "gpu", "cpu"]) -> list[Resources]:
    """Return the resources of the nodes that can work if one of this kind is among them; otherwise none.

    No other node comes to a cluster that this process has started: then the kind does not matter.
    """
    nodes = working_nodes()
    return nodes if kind != "gpu" or not is_shared() or any(node.get("GPU", 0) > 0 for node in nodes) else []
