"""The planner against a simulation, event by event, of images that go through decoding, a device and encoding."""

from __future__ import annotations

import heapq
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stpm.errors import ConfigError, DataError
from stpm.scoring.capacity import Cost, NodeKind, balanced
from stpm.scoring.resuming.run_state import Effort

GPU, CPU = NodeKind("gpu", 8, 1, 1.0), NodeKind("cpu", 16, 0, 0.7)


def simulated(cost: Cost, cpus: int, gpus: int, images: int) -> float:
    """Images per second: each takes a core, then a device, then a core again; those further on go first."""
    stages = [("cpu", cost.decode), ("gpu" if cost.on_gpu else "cpu", cost.forward), ("cpu", cost.encode)]
    free = {"cpu": cpus - gpus if cost.on_gpu else cpus, "gpu": gpus}
    waiting = [deque(range(images)), deque[int](), deque[int]()]
    events: list[tuple[float, int, int]] = []
    now, done = 0.0, 0
    while done < images:
        for stage in (2, 1, 0):
            kind, seconds = stages[stage]
            # Back-pressure: nobody decodes far ahead of the devices.
            while waiting[stage] and free[kind] and (stage or len(waiting[1]) < 4 * (cpus + gpus)):
                free[kind] -= 1
                heapq.heappush(events, (now + seconds, stage, waiting[stage].popleft()))
        now, stage, image = heapq.heappop(events)
        free[stages[stage][0]] += 1
        if stage < 2:
            waiting[stage + 1].append(image)
        else:
            done += 1
    return images / now


seconds = st.floats(0.001, 0.05)


@settings(max_examples=60, deadline=None)
@given(
    decode=seconds,
    forward=seconds,
    encode=seconds,
    on_gpu=st.booleans(),
    nodes=st.integers(1, 4),
    more=st.integers(0, 2),
)
def test_speed_is_that_of_a_simulation(
    decode: float, forward: float, encode: float, on_gpu: bool, nodes: int, more: int
) -> None:
    cost = Cost(decode, forward, encode, on_gpu)
    cpus, gpus = int(nodes * GPU.cpus + more * CPU.cpus), nodes
    planned = cost.images_per_second(cpus, gpus if on_gpu else 0)
    assert simulated(cost, cpus, gpus, 4000) == pytest.approx(planned, rel=0.15)


def test_helpers_come_where_they_pay_and_only_there() -> None:
    heavy = Cost(decode=0.1, forward=0.005, encode=0.01, on_gpu=True)
    plan = balanced(heavy, 1_000_000, 2, GPU, CPU, 0.0)
    assert plan.helping > 0
    assert plan.images_per_second > balanced(heavy, 1_000_000, 2, GPU, None, 0.0).images_per_second
    alone = [balanced(heavy, 1_000_000, 2, GPU, NodeKind("cpu", 16, 0, price), 0.0) for price in (0.0, 100.0)]
    assert alone[0].images_per_second == pytest.approx(2 / 0.005), "free helpers: until the devices are the limit"
    assert alone[1].helping == 0
    light = Cost(decode=0.001, forward=0.005, encode=0.001, on_gpu=True)
    assert balanced(light, 1_000_000, 2, GPU, CPU, 0.0).helping == 0


def test_hours_and_money() -> None:
    plan = balanced(Cost(0.01, 0.05, 0.02, on_gpu=False), 360_000, 10, NodeKind("c", 8, 0, 0.5), None, 0.25)
    assert plan.images_per_second == pytest.approx(1000)
    assert plan.hours == pytest.approx(0.35)
    assert plan.money == pytest.approx(1.75)


def test_what_cannot_be_planned_is_said() -> None:
    with pytest.raises(DataError, match="scored no image"):
        Cost.of(Effort())
    with pytest.raises(ConfigError, match="has no GPU"):
        balanced(Cost(1, 1, 1, on_gpu=True), 1, 1, CPU, None, 0.0)
    for text in ("a:8:1", "a:x:1:1", "a:0:1:1"):
        with pytest.raises(ConfigError, match="NAME:CPUS:GPUS:PRICE"):
            NodeKind.parse(text)
