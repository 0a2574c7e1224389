from __future__ import annotations

import pytest
import torch

from stpm.method.device import is_out_of_memory, resolve_precision, set_up_device


def test_set_up_device_sets_float32_and_deterministic_kernels() -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = cudnn.benchmark = True
        cudnn.deterministic = False
        set_up_device()
        assert [cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark] == [False] * 3
        assert cudnn.deterministic
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


def test_a_precision_that_is_asked_for_is_kept() -> None:
    cpu = torch.device("cpu")
    assert [resolve_precision(wanted, cpu) for wanted in ("float32", "bfloat16")] == ["float32", "bfloat16"]


def test_too_little_memory_is_told_from_other_errors_on_a_cpu() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**56, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
