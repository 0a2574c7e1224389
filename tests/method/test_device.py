import pytest
import torch

from stpm.errors import DeviceError
from stpm.method.device import is_out_of_memory, set_up_device


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
