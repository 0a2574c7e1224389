"""The device that computes features, how torch computes on it, and in which precision."""

from __future__ import annotations

import torch

from stpm.method.recipe import Precision, WantedPrecision

# In messages of a plain RuntimeError: of a CPU's allocator, of CUDA when it starts on a full GPU, of cuBLAS and cuDNN.
_OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "ALLOC_FAILED")


def set_up_device() -> torch.device:
    """Make torch's GPU arithmetic reproducible, and return the GPU that this process was given, or the CPU.

    Process-wide, float32 then keeps its 23 bits (cuDNN's default is TF32, which keeps 10), and cuDNN uses algorithms
    that give the same bits for the same input.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(wanted: WantedPrecision, device: torch.device) -> Precision:
    """Replace `auto` by bfloat16 where the device computes it natively (emulated, it is slower), else by float32."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory did not suffice. PyTorch often reports this as a plain RuntimeError."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
