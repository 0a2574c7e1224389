"""How scorers and the tasks of the other stages share the CPUs and GPUs of a cluster."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from stpm.cluster.connection import Resources, is_shared, working_nodes
from stpm.errors import ConfigError
from stpm.scoring.options import ScoreOptions

# Tasks that fetch, decode or write, per CPU core: each waits half of its time for storage or for a scorer.
_TASKS_PER_CORE = 2
# A task takes at most this fraction of the CPUs that scorers leave free, so that tasks of the other stages fit too.
_MAX_FRACTION_OF_REST = 1 / 4
# Fraction of a cluster that is reserved for the stages (decode, score, write) in equal parts: Ray Data's default.
_RESERVED_FRACTION = 0.5
_STAGES = 3
# Tasks that must fit the RAM of any node.
_MIN_TASKS = 4
# Ray counts CPUs in ten-thousandths.
_UNITS_PER_CPU = 10_000


@dataclass(frozen=True)
class ScorerPool:
    """The actors that score, and the resources of each scorer and of each task that fetches, decodes or writes.

    Args:
        max_size: maximum number of scorers after nodes have been added.
        reserved_fraction: of the cluster, reserved for the stages in equal parts.
        node_ram: of the smallest node, in bytes.
    """

    size: int
    max_size: int
    scorer_cpus: float
    scorer_gpus: float
    task_cpus: float
    reserved_fraction: float
    node_ram: float = math.inf

    def ram_for(self, task_bytes: int) -> int:
        """Return the bytes to request from Ray for a task: no more than fit the smallest node several times."""
        return int(min(task_bytes, self.node_ram / _MIN_TASKS))

    @classmethod
    def for_nodes(cls, scorers: int, nodes: Sequence[Resources], blocks: int, *, grows: bool) -> ScorerPool:
        """Plan the pool for a cluster.

        Args:
            scorers: requested number; 0: one per GPU, or without GPUs one per CPU core.
            nodes: the resources of each node that runs tasks.
            grows: nodes may be added during the run.

        Raises:
            ConfigError: if the requested scorers do not fit.
        """
        cpus, gpus = (sum(int(node.get(kind, 0)) for node in nodes) for kind in ("CPU", "GPU"))
        fits = gpus or cpus
        if not fits:
            raise ConfigError("the cluster has no node with a CPU; scoring needs one")
        if scorers > fits and not grows:
            raise ConfigError(f"{scorers} scorers do not fit {fits} {'GPUs' if gpus else 'CPU cores'}; lower --scorers")
        size = min(scorers or fits, fits, max(blocks, 1))
        scorer_cpus, task_cpus = _cpus_beside_gpus(nodes) if gpus else _cpus_on_cores(nodes)
        return cls(
            size=size,
            max_size=max(scorers or blocks, size) if grows else size,
            scorer_cpus=scorer_cpus,
            scorer_gpus=1.0 if gpus else 0.0,
            task_cpus=task_cpus,
            reserved_fraction=_reserved_fraction(sum(node["CPU"] for node in nodes), size * scorer_cpus),
            node_ram=min(node.get("memory", math.inf) for node in nodes),
        )


def describe_plan(options: ScoreOptions, node: Resources) -> str:
    """Describe how many scorers and tasks would run on a node of the connected cluster; "" if none."""
    cpus = node.get("CPU", 0)
    if not cpus:
        # There may be no other node yet.
        return ""
    pool = ScorerPool.for_nodes(options.scorers, working_nodes(), sys.maxsize, grows=is_shared())
    scorers = min(pool.size, int(node.get("GPU", 0)) if pool.scorer_gpus else int(cpus))
    tasks = int(round((cpus - scorers * pool.scorer_cpus) / pool.task_cpus, 6))
    tasks_text = f"{tasks} tasks that fetch, decode and write"
    if not scorers:
        return tasks_text
    # Ray chooses the nodes of a requested number of scorers.
    limit = "up to " if options.scorers else ""
    gpu = ", 1 GPU" if pool.scorer_gpus else ""
    return f"{limit}{count_scorers(scorers)} of {pool.scorer_cpus:g} CPU{gpu}; {tasks_text}"


def count_scorers(number: int) -> str:
    """Write a number of scorers.

    >>> count_scorers(1), count_scorers(2)
    ('1 scorer', '2 scorers')
    """
    return f"{number} scorer{'' if number == 1 else 's'}"


def _cpus_beside_gpus(nodes: Sequence[Resources]) -> tuple[float, float]:
    """Return the CPUs per scorer and per other task. Other tasks fit a node beside a scorer on each of its GPUs."""
    with_gpus = [node for node in nodes if node.get("GPU", 0) > 0]
    scorer = _round_down(min(1.0, *(node["CPU"] / (node["GPU"] + 1) for node in with_gpus)))
    rest = min(node["CPU"] - node["GPU"] * scorer for node in with_gpus)
    return scorer, _round_down(min(1 / _TASKS_PER_CORE, rest * _MAX_FRACTION_OF_REST))


def _cpus_on_cores(nodes: Sequence[Resources]) -> tuple[float, float]:
    """Return the CPUs per scorer and per other task: one scorer and two tasks share each core.

    A scorer computes in one thread: one scorer per core is faster than fewer with more threads.
    """
    cores = max(int(node["CPU"]) for node in nodes)
    # Just over cores / (cores + 1): a node fits exactly one scorer per core.
    scorer = _round_down(cores / (cores + 1)) + 1 / _UNITS_PER_CPU
    rest = cores * (1 - scorer)
    return scorer, _round_down(min(rest / (cores * _TASKS_PER_CORE), rest * _MAX_FRACTION_OF_REST))


def _reserved_fraction(cpus: float, cpus_of_scorers: float) -> float:
    """Return the fraction of a cluster's CPUs to reserve for the stages, given the CPUs of all scorers.

    Ray reserves CPUs for the stages in their order (decode, score, write), and none for a stage if too few are left. If
    the last stage has none, it writes nothing before all images are decoded, and scored images fill the memory.
    """
    # While the manifest is read there is one more stage, which itself takes no CPUs.
    for stages in (_STAGES, _STAGES + 1):
        per_stage = _RESERVED_FRACTION * cpus / stages
        if cpus - 2 * per_stage < cpus_of_scorers <= cpus - per_stage:
            return _round_down(_STAGES * (cpus - cpus_of_scorers) / (2 * cpus))
    return _RESERVED_FRACTION


def _round_down(cpus: float) -> float:
    return math.floor(cpus * _UNITS_PER_CPU) / _UNITS_PER_CPU
