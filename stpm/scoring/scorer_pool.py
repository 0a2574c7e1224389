"""How the processes of a pass share out the cores and devices of a cluster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stpm.cluster.connection import Resources
from stpm.errors import ConfigError

# Half of the time of such a task is waiting for storage, or for a scorer on the same core.
_TASKS_PER_CORE = 2
# Of what scorers leave: so small that each of the three other stages has room for one.
_SHARE_OF_REST = 1 / 4
# Of a cluster, evenly for the four stages; Ray Data's default.
_SET_ASIDE = 0.5
_STAGES = 4
# That there is room for on any node, whatever memory they ask for.
_FEWEST_TASKS = 4
# Ray counts in ten-thousandths.
_GRAIN = 10_000


@dataclass(frozen=True)
class ScorerPool:
    """The actors that score: how many, how many there may be when nodes come, and what each takes of its node.

    `stage_cpus` is what each task takes that fetches, decodes or writes; `reserved` is the share of the cluster that
    is kept for the stages, the same for each; `node_memory` is that of the smallest node, in bytes.
    """

    size: int
    most: int
    num_cpus: float
    num_gpus: float
    stage_cpus: float
    reserved: float
    node_memory: float = math.inf

    def memory_for(self, task: int) -> int:
        """Bytes to ask Ray for, for a task that takes so many: no more than lets some be on the smallest node."""
        return int(min(task, self.node_memory / _FEWEST_TASKS))

    @classmethod
    def of(cls, scorers: int, nodes: Sequence[Resources], blocks: int, *, grows: bool) -> ScorerPool:
        """The pool for a cluster and a number of blocks to score.

        Args:
            scorers: as many as are wanted; 0: one per GPU, or without GPUs one per CPU core.
            nodes: what each node has, of those that take work.
            blocks: that there are to score.
            grows: nodes may come while it runs.

        Raises:
            ConfigError: if the wanted scorers do not fit.
        """
        cpus, gpus = (sum(int(node.get(kind, 0)) for node in nodes) for kind in ("CPU", "GPU"))
        fits = gpus or cpus
        if not fits:
            raise ConfigError("the cluster has no node with a CPU; scoring needs one")
        if scorers > fits and not grows:
            raise ConfigError(f"{scorers} scorers do not fit {fits} {'GPUs' if gpus else 'CPU cores'}; lower --scorers")
        size = min(scorers or fits, fits, max(blocks, 1))
        most = max(scorers or blocks, size) if grows else size
        num_cpus, stage_cpus = _beside_gpus(nodes) if gpus else _on_cores(nodes)
        total = sum(node["CPU"] for node in nodes)
        reserved = _set_aside(total, size * num_cpus)
        memory = min(node.get("memory", math.inf) for node in nodes)
        return cls(size, most, num_cpus, 1.0 if gpus else 0.0, stage_cpus, reserved, memory)


def _beside_gpus(nodes: Sequence[Resources]) -> tuple[float, float]:
    """CPUs of a scorer and of another task: some of these on each node whose devices all have a scorer."""
    with_gpus = [node for node in nodes if node.get("GPU", 0) > 0]
    scorer = _floor(min(1.0, *(node["CPU"] / (node["GPU"] + 1) for node in with_gpus)))
    rest = min(node["CPU"] - node["GPU"] * scorer for node in with_gpus)
    return scorer, _floor(min(1 / _TASKS_PER_CORE, rest * _SHARE_OF_REST))


def _on_cores(nodes: Sequence[Resources]) -> tuple[float, float]:
    """CPUs of a scorer and of another task, where both are on each core.

    A scorer computes in one thread: one per core beats fewer with more threads. The kernel shares the core out.
    """
    most = max(int(node["CPU"]) for node in nodes)
    # Just so much that no node has room for one more than it has cores.
    scorer = _floor(most / (most + 1)) + 1 / _GRAIN
    rest = most * (1 - scorer)
    return scorer, _floor(min(rest / (most * _TASKS_PER_CORE), rest * _SHARE_OF_REST))


def _set_aside(total: float, scorers: float) -> float:
    """The share of some CPUs to set aside for the stages, of which scorers take so many.

    Ray serves the stages in their order, and one for which too little is left has nothing of its own: the last one,
    then, writes nothing before all is decoded, and what was scored piles up.
    """
    each = _SET_ASIDE * total / _STAGES
    if total - 3 * each < scorers <= total - 2 * each:
        return _floor(_STAGES * (total - scorers) / (3 * total))
    return _SET_ASIDE


def _floor(cpus: float) -> float:
    return math.floor(cpus * _GRAIN) / _GRAIN
