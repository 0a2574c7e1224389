from __future__ import annotations

import torch

from stpm.method.forward import pick_device


def test_pick_device_sets_float32_and_deterministic_kernels() -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = cudnn.benchmark = True
        cudnn.deterministic = False
        pick_device()
        assert [cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark] == [False] * 3
        assert cudnn.deterministic
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark = before
