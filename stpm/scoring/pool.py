"""How the processes of a pass share out the cores and devices of a cluster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stpm.cluster import Resources
from stpm.errors import ConfigError

# Where devices score, two tasks of the other stages go to a core: half of the time of one is waiting for storage.
_BESIDE_GPUS = 0.5
# Ray counts in ten-thousandths.
_GRAIN = 10_000


@dataclass(frozen=True)
class ScorerPool:
    """The actors that score: how many, how many there may be when nodes come, and what each takes of its node.

    `stage_cpus` is what each task takes that fetches, decodes or writes.
    """

    size: int
    most: int
    num_cpus: float
    num_gpus: float
    stage_cpus: float

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
        return cls(size, most, num_cpus, 1.0 if gpus else 0.0, stage_cpus)


def _beside_gpus(nodes: Sequence[Resources]) -> tuple[float, float]:
    """CPUs of a scorer and of another task: at least one of these on each node whose devices all have a scorer."""
    room = min(node["CPU"] / (node["GPU"] + 1) for node in nodes if node.get("GPU", 0) > 0)
    return _floor(min(1.0, room)), _floor(min(_BESIDE_GPUS, room))


def _on_cores(nodes: Sequence[Resources]) -> tuple[float, float]:
    """CPUs of a scorer and of another task, where both are on each core.

    A scorer computes in one thread: one per core beats fewer with more threads. A core also has room for one other
    task, and the kernel shares it out between the two.
    """
    most = max(int(node["CPU"]) for node in nodes)
    # Just so much that no node has room for one more than it has cores.
    scorer = _floor(most / (most + 1)) + 1 / _GRAIN
    return scorer, _floor(1 - scorer)


def _floor(cpus: float) -> float:
    return math.floor(cpus * _GRAIN) / _GRAIN
