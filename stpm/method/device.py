"""The device that computes features, and how torch computes on it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from stpm.errors import DeviceError, one_line
from stpm.method.arithmetic import Capabilities, cpu_capabilities

# In messages of a plain RuntimeError: of a CPU's allocator, of CUDA when it starts on a full GPU, of cuBLAS and cuDNN.
_OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "ALLOC_FAILED")


def set_up_device(gpu: int | None) -> torch.device:
    """Make torch's GPU arithmetic reproducible, and return a GPU that torch can use, or the CPU.

    Process-wide, float32 then keeps its 23 bits (cuDNN's default is TF32, which keeps 10), and cuDNN uses algorithms
    that give the same bits for the same input.

    Args:
        gpu: its index among those that torch sees, which becomes torch's current one; None: the CPU.

    Raises:
        DeviceError: if torch cannot use the GPU.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if gpu is None:
        return torch.device("cpu")
    device = torch.device("cuda", gpu)
    try:
        torch.zeros(1, device=device).item()
        torch.cuda.set_device(device)
    # A build without CUDA raises AssertionError.
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(_reason(error)) from error
    return device


def local_device() -> torch.device:
    """Return a GPU of this machine if torch sees one, or else the CPU, see `set_up_device`; raise as it does."""
    return set_up_device(0 if torch.cuda.is_available() else None)


def _reason(error: Exception) -> str:
    """Say in one line why torch cannot use a GPU, and what to do."""
    if torch.version.cuda or torch.version.hip:
        remedy = "update its driver, or install a torch that the driver supports; if the GPU is lost, restart the node"
    else:
        remedy = "install a torch that is built for CUDA on every node with a GPU"
    return (
        f"torch {torch.__version__} cannot use the GPU of {socket.gethostname()}: {one_line(error)}; {remedy}. To "
        "compute on CPUs, hide the GPU from Ray: CUDA_VISIBLE_DEVICES= on one machine, else ray start --num-gpus 0"
    )


def device_capabilities(device: torch.device) -> Capabilities:
    """Return what a device of this machine can compute with."""
    if device.type == "cpu":
        return cpu_capabilities()
    return Capabilities(True, torch.cuda.is_bf16_supported(including_emulation=False), False)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device, which no one waits for. To a CPU it is not copied."""
    if device.type == "cpu":
        return tensor
    # From other memory than pinned, a copy waits for all that the device has to compute before it.
    return tensor.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=1024)
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers as float32 on a device, to which they are copied once; no one may change them."""
    return send(torch.tensor(values, dtype=torch.float32), device)


def fetch(tensors: Sequence[Tensor]) -> Callable[[], list[npt.NDArray[Any]]]:
    """Begin to copy tensors of one device to the host; those of a CPU are not copied.

    Return a function that waits for all of them at once, but for nothing that the device has to compute after them.
    """
    if all(tensor.device.type == "cpu" for tensor in tensors):
        arrays = [tensor.numpy() for tensor in tensors]
        return lambda: arrays
    empty = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    pinned = [to.copy_(tensor, non_blocking=True) for to, tensor in zip(empty, tensors, strict=True)]
    copied = torch.cuda.current_stream().record_event()

    def arrive() -> list[npt.NDArray[Any]]:
        copied.synchronize()
        return [tensor.numpy() for tensor in pinned]

    return arrive


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory did not suffice. PyTorch often reports this as a plain RuntimeError."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
