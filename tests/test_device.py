"""The device that a process computes on, by what Ray assigned to it."""

import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import ray
import torch

import stpm.cluster.device
from stpm.cluster.device import KEEP_FREED_MEMORY, assigned_device
from stpm.errors import DeviceError


@pytest.mark.parametrize(
    ("assigned", "visible", "device"),
    [
        # Ray 2.60 hides no GPU from a process that it assigned none.
        ([], None, "cpu"),
        ([], "0,1", "cpu"),
        # With RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO it hides them.
        ([], "", "cpu"),
        # A task or an actor sees its own GPU alone, or a part of it.
        (["3"], "3", "cuda:0"),
        # A worker of Ray Train sees those of all workers on its node.
        (["2"], "0,1,2,3", "cuda:2"),
        # Ray names the GPUs as the node's own CUDA_VISIBLE_DEVICES does.
        (["GPU-b"], "GPU-a,GPU-b", "cuda:1"),
        # RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES
        (["1"], None, "cuda:1"),
    ],
)
def test_a_process_of_ray_computes_on_what_ray_assigned(
    assigned: Sequence[str], visible: str | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started_by_ray(assigned, visible, monkeypatch)
    kept: list[None] = []
    monkeypatch.setattr(stpm.cluster.device, "keep_freed_memory", lambda: kept.append(None))
    assert assigned_device() == torch.device(device)
    assert bool(kept) == (device == "cpu")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not GNU's")
def test_a_process_that_keeps_freed_memory_takes_no_more_from_the_kernel() -> None:
    """By mallopt in the main thread, and by variables of the process in any thread."""
    program = """
import resource, sys, threading
from stpm.cluster.device import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(80 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def show():
    if sys.argv[1] == "mallopt":
        keep_freed_memory()
    print(faults(), faults())
if sys.argv[2] == "main":
    show()
else:
    threading.Thread(target=show).start()
"""

    def run(how: str, thread: str = "main", **variables: str) -> list[int]:
        command = [sys.executable, "-c", program, how, thread]
        printed = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
        return [int(each) for each in printed.stdout.split()]

    pages = 80 * 2**20 // resource.getpagesize()
    # A bytearray of zeros is cleared by the kernel where it is new, page by page; some kernels map several at once.
    _, again = run("nothing")
    for first, second in (run("mallopt"), run("variables", "other", **KEEP_FREED_MEMORY["env_vars"])):
        assert second < pages / 100
        assert min(again, first) > 4 * second


def test_a_gpu_that_is_hidden_from_its_process_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    started_by_ray(["2"], "0,1", monkeypatch)
    with pytest.raises(DeviceError, match="Ray assigned GPU 2, which CUDA_VISIBLE_DEVICES=0,1 hides"):
        assigned_device()


@pytest.mark.parametrize(("available", "device"), [(True, "cuda:0"), (False, "cpu")])
def test_a_process_that_ray_did_not_start_uses_a_gpu_if_there_is_one(
    available: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started_by_ray([], None, monkeypatch, mode=ray.SCRIPT_MODE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert assigned_device() == torch.device(device)


def started_by_ray(
    assigned: Sequence[str], visible: str | None, monkeypatch: pytest.MonkeyPatch, mode: int = ray.WORKER_MODE
) -> None:
    """Let this process pass for one of Ray's, on a node whose GPUs torch can use."""
    context = SimpleNamespace(worker=SimpleNamespace(mode=mode), get_accelerator_ids=lambda: {"GPU": list(assigned)})
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: SimpleNamespace(item=lambda: 0.0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
