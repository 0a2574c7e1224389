"""How many nodes, hours and how much money a pass takes, from what another pass took per image."""

from __future__ import annotations

from dataclasses import dataclass

from stpm.errors import ConfigError, DataError
from stpm.scoring.resuming.run_state import Effort


@dataclass(frozen=True)
class NodeKind:
    """A node type: its CPU cores, its GPUs, and what an hour of it costs.

    Raises:
        ConfigError: if it has no core, or a number is negative.
    """

    name: str
    cpus: float
    gpus: float
    price: float

    def __post_init__(self) -> None:
        if self.cpus <= 0 or self.gpus < 0 or self.price < 0:
            raise ConfigError(f"{self.name}: give a node as NAME:CPUS:GPUS:PRICE, with at least one CPU")

    @classmethod
    def parse(cls, text: str) -> NodeKind:
        """From `NAME:CPUS:GPUS:PRICE`.

        Raises:
            ConfigError: if it is not that.
        """
        try:
            name, cpus, gpus, price = text.split(":")
            return cls(name, float(cpus), float(gpus), float(price))
        except ValueError:
            raise ConfigError(f"{text!r} is no node; give it as NAME:CPUS:GPUS:PRICE") from None


@dataclass(frozen=True)
class Cost:
    """Seconds per image: of a CPU core to fetch and decode, of a device to score, of a CPU core for heatmaps."""

    decode: float
    forward: float
    encode: float
    on_gpu: bool

    @classmethod
    def of(cls, effort: Effort) -> Cost:
        """What a run took.

        Raises:
            DataError: if it scored nothing.
        """
        if not effort.images or not effort.forward_seconds:
            raise DataError("the run scored no image; plan from one that did")
        stages = (effort.decode_seconds, effort.forward_seconds, effort.encode_seconds)
        decode, forward, encode = (seconds / effort.images for seconds in stages)
        return cls(decode, forward, encode, effort.device == "gpu")

    def images_per_second(self, cpus: float, gpus: float) -> float:
        """What so many cores and devices do when none waits for another.

        A scorer on a GPU keeps one core busy with feeding it.
        """
        if not self.on_gpu:
            return cpus / (self.decode + self.forward + self.encode)
        return min(gpus / self.forward, max(cpus - gpus, 0.0) / (self.decode + self.encode))


@dataclass(frozen=True)
class Plan:
    """Nodes of two kinds, and what they would take: the first kind scores, the second helps with all else."""

    scoring: int
    helping: int
    images_per_second: float
    hours: float
    money: float


def balanced(cost: Cost, images: int, nodes: int, kind: NodeKind, helper: NodeKind | None, start_hours: float) -> Plan:
    """For so many scoring nodes, the number of helping ones that costs least.

    Args:
        cost: per image.
        images: to score.
        nodes: that score.
        kind: of those.
        helper: nodes without GPUs that fetch, decode and write, if there may be any.
        start_hours: until a node works, which is paid too.

    Raises:
        ConfigError: if the run was on GPUs and the scoring kind has none.
    """
    if cost.on_gpu and not kind.gpus:
        raise ConfigError(f"{kind.name} has no GPU, and the run to plan from used them")

    def of(helping: int) -> Plan:
        cpus = nodes * kind.cpus + (helping * helper.cpus if helper else 0)
        speed = cost.images_per_second(cpus, nodes * kind.gpus)
        hours = start_hours + images / speed / 3600 if speed else float("inf")
        price = nodes * kind.price + (helping * helper.price if helper else 0)
        return Plan(nodes, helping, speed, hours, hours * price)

    plans = [of(0)]
    # Where the devices are the limit another helper adds nothing. Without devices it is one more core like the others.
    while helper and cost.on_gpu:
        more = of(len(plans))
        if plans[-1].images_per_second and more.images_per_second <= plans[-1].images_per_second:
            break
        plans.append(more)
    return min(plans, key=lambda plan: (plan.money, plan.hours))
