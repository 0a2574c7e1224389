from __future__ import annotations

import torch

from stpm.method.device import resolve_precision, set_up_device


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
    assert resolve_precision("auto", cpu) in ("float32", "bfloat16")
