from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stpm.errors import DeviceError
from stpm.method.device import fetch, is_out_of_memory, set_up_device


def test_set_up_device_sets_float32_and_deterministic_kernels() -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = cudnn.benchmark = True
        cudnn.deterministic = False
        assert set_up_device(None) == torch.device("cpu")
        assert [cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark] == [False] * 3
        assert cudnn.deterministic
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


@pytest.mark.parametrize(
    ("cuda", "error", "remedy"),
    [
        (None, AssertionError("Torch not compiled with CUDA"), "install a torch that is built for CUDA"),
        (
            "12.8",
            RuntimeError("Your NVIDIA driver is too old.\nPlease update it"),
            "update its driver, or install a torch",
        ),
        ("12.8", RuntimeError("CUDA error: unspecified launch failure"), "if the GPU is lost, restart the node"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_one_line_with_the_reason_and_a_remedy(
    cuda: str | None, error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(DeviceError) as caught:
        set_up_device(0)
    assert "\n" not in str(caught.value)
    for part in (" ".join(str(error).split()), remedy, "CUDA_VISIBLE_DEVICES="):
        assert part in str(caught.value)


def test_too_little_memory_is_told_from_other_errors_on_a_cpu() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**56, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


class OnGpu(torch.Tensor):
    """A tensor of the host that says that it is a GPU's."""

    device = torch.device("cuda")


def test_copies_from_a_gpu_go_to_pinned_memory_and_are_waited_for_once_when_they_are_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[object] = []
    make, event = torch.empty, SimpleNamespace(synchronize=lambda: events.append("wait"))

    def empty(shape: Any, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        events.append((*shape, pin_memory))
        return make(shape, dtype=dtype)

    stream = SimpleNamespace(record_event=lambda: (events.append("record"), event)[1])
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    maps = torch.arange(6.0).reshape(2, 3), torch.tensor([7, 8], dtype=torch.uint8)
    arrive = fetch([each.as_subclass(OnGpu) for each in maps])
    assert events == [(2, 3, True), (2, True), "record"]
    for found, expected in zip(arrive(), maps, strict=True):
        np.testing.assert_array_equal(found, expected.numpy())
    assert events[3:] == ["wait"]
