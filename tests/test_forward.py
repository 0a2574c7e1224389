from __future__ import annotations

import pytest
import torch

from stpm.forward import pick_device


def test_a_gpu_is_asked_for_true_float32_and_the_same_bits_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    flags = [(cudnn, "allow_tf32", False), (matmul, "allow_tf32", False)]
    flags += [(cudnn, "deterministic", True), (cudnn, "benchmark", False)]
    for where, name, wanted in flags:
        monkeypatch.setattr(where, name, not wanted)
    pick_device()
    assert [getattr(where, name) for where, name, _ in flags] == [wanted for *_, wanted in flags]
