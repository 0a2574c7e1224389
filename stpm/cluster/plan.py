"""What each node of the cluster would run, as a table in the log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import ray
from tabulate import tabulate

from stpm.cluster.connection import Resources, connected, is_shared
from stpm.console import log_lines

log = logging.getLogger(__name__)


def log_plan(columns: Mapping[str, Callable[[Resources], str]]) -> None:
    """Log a table of the cluster's nodes: their resources, and what each would run.

    Args:
        columns: by heading, a function from a node's resources to what it would run.
    """
    with connected():
        driver = ray.get_runtime_context().get_node_id()
        nodes = sorted((n for n in ray.nodes() if n["Alive"]), key=lambda node: node["NodeID"] != driver)
        rows = [
            [
                node["NodeManagerAddress"],
                *(f"{node['Resources'].get(kind, 0):g}" for kind in ("CPU", "GPU")),
                "driver" if node["NodeID"] == driver else "",
                *(describe(node["Resources"]) for describe in columns.values()),
            ]
            for node in nodes
        ]
        log_lines(tabulate(rows, ["node", "CPUs", "GPUs", "", *columns], disable_numparse=True))
        log.info("Nodes that come later take work too. Nothing was started." if is_shared() else "Nothing was started.")
