"""The device that this process computes on, as Ray assigned it, and what the devices of all nodes can compute with."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stpm.cluster.connection import is_shared
from stpm.cluster.ray_failures import results_of
from stpm.errors import HOW_TO_CONTINUE, DeviceError, RunInterruptedError
from stpm.method.arithmetic import Capabilities, cpu_capabilities

if TYPE_CHECKING:
    import torch

# Of a GPU, for a task that examines it.
_GPU_SHARE = 0.01
# For the answers of the other nodes, after the first one's.
_ANSWER_SECONDS = 30.0
# Parameters of the C library's mallopt, by their numbers in malloc.h: trim threshold, mappings, arenas.
_KEEP_FREED_MEMORY = {-1: 2**31 - 1, -4: 0, -8: 1}
# The same as variables that the C library reads when a process starts. `mallopt` comes too late for a thread that runs
# already: it has an arena of its own, which returns tensors of more than 64 MiB to the kernel all the same.
KEEP_FREED_MEMORY = {
    "env_vars": {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
}


def assigned_device() -> torch.device:
    """Return the device that this process computes on, and prepare torch for it.

    In a task or an actor it is the GPU that Ray assigned, or without one the CPU, even if torch sees a GPU: Ray 2.60
    hides no GPU from a process that it assigned none. In a process that Ray did not start it is a GPU if there is one.
    A task or an actor on a CPU then keeps the memory that it frees.

    Raises:
        DeviceError: if torch cannot use the GPU, or it is hidden from the process.
    """
    from stpm.method.device import local_device, set_up_device

    context = ray.get_runtime_context() if ray.is_initialized() else None
    if context is None or context.worker.mode != ray.WORKER_MODE:
        return local_device()
    assigned = context.get_accelerator_ids()["GPU"]
    if not assigned:
        keep_freed_memory()
        return set_up_device(None)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return set_up_device(int(assigned[0]))
    # Ray lets a process see the GPUs that it assigned to it alone, Ray Train those of all workers on a node.
    if assigned[0] not in visible.split(","):
        raise DeviceError(
            f"Ray assigned GPU {assigned[0]}, which CUDA_VISIBLE_DEVICES={visible} hides; leave that variable to Ray"
        )
    return set_up_device(visible.split(",").index(assigned[0]))


def keep_freed_memory() -> None:
    """Keep the memory that this process frees, where its C library is GNU's.

    By default it returns every large tensor to the kernel and takes a new one, and the kernel clears each page again:
    up to half of the time of a forward pass or a training step on a CPU.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for parameter, value in _KEEP_FREED_MEMORY.items():
            mallopt(parameter, value)


def examine_devices(*, gpus: bool) -> list[Capabilities]:
    """Return what the GPU, or the CPU, of each node that can work can compute with. Needs a connection to Ray.

    Wait for the first node. Then leave out those that do not answer soon: other jobs may hold all their GPUs. The CPU
    of this machine alone is examined here: a process would have to start for it.

    Raises:
        DeviceError: if torch cannot use a GPU that Ray assigns.
        RunInterruptedError: if there is no node.
    """
    if not (gpus or is_shared()):
        return [cpu_capabilities()]
    examine = ray.remote(num_cpus=0, num_gpus=_GPU_SHARE if gpus else 0)(_examine_device)
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU" if gpus else "CPU", 0) > 0]
    # The task of a node that is lost meanwhile runs on another.
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=True) for node in nodes]
    tasks = [examine.options(scheduling_strategy=place).remote(gpus) for place in places]
    if not tasks:
        raise RunInterruptedError(f"all nodes that can work have left; {HOW_TO_CONTINUE}")
    ray.wait(tasks)
    answered, late = ray.wait(tasks, num_returns=len(tasks), timeout=_ANSWER_SECONDS)
    for task in late:
        ray.cancel(task)
    found: list[Capabilities] = results_of(answered)
    return found


def _examine_device(gpu: bool) -> Capabilities:
    if not gpu:
        # Without torch, whose import takes seconds.
        return cpu_capabilities()
    from stpm.method.device import device_capabilities

    return device_capabilities(assigned_device())
