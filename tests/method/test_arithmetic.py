from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from stpm.errors import ConfigError
from stpm.method.arithmetic import Arithmetic, Capabilities, choose_arithmetic, cpu_capabilities
from stpm.method.recipe import Precision, WantedPrecision
from stpm.options import WantedBackend

GPU, OLD_GPU = Capabilities(True, True, False), Capabilities(True, False, False)
CPU, OLD_CPU, BARE_CPU = (Capabilities(False, *has) for has in ((True, True), (False, True), (True, False)))
OPENVINO, PYTORCH = Arithmetic("openvino", "bfloat16"), Arithmetic("pytorch", "bfloat16")
IN_FLOAT32 = Arithmetic("openvino", "float32")


@pytest.mark.parametrize(
    ("devices", "wanted", "before", "chosen"),
    [
        ([CPU, CPU], "auto", None, OPENVINO),
        ([CPU, CPU], "pytorch", None, PYTORCH),
        ([GPU, GPU], "openvino", None, PYTORCH),
        # What one device lacks, none uses.
        ([CPU, BARE_CPU], "auto", None, PYTORCH),
        ([CPU, OLD_CPU], "auto", None, IN_FLOAT32),
        ([GPU, OLD_GPU], "auto", None, Arithmetic("pytorch", "float32")),
        # A run that is resumed keeps what it began with, if it can and its options do not say otherwise.
        ([CPU], "auto", PYTORCH, PYTORCH),
        ([CPU], "auto", IN_FLOAT32, IN_FLOAT32),
        ([CPU], "openvino", PYTORCH, OPENVINO),
        ([OLD_CPU], "auto", OPENVINO, IN_FLOAT32),
        ([GPU], "auto", OPENVINO, PYTORCH),
    ],
)
def test_all_devices_of_a_run_compute_alike(
    devices: Sequence[Capabilities], wanted: WantedBackend, before: Arithmetic | None, chosen: Arithmetic
) -> None:
    assert choose_arithmetic(devices, wanted, before=before) == chosen


def test_a_recipe_may_ask_for_a_precision_and_a_model_keeps_its_own_where_it_is_native() -> None:
    wanted: tuple[WantedPrecision, ...] = ("auto", "float32", "bfloat16")
    assert [PYTORCH.precision_to_fit(each) for each in wanted] == ["bfloat16", "float32", "bfloat16"]
    assert [IN_FLOAT32.precision_to_fit(each) for each in wanted] == ["float32", "float32", "bfloat16"]
    fitted: tuple[Precision, ...] = ("float32", "bfloat16")
    assert [PYTORCH.precision_to_score(each) for each in fitted] == ["float32", "bfloat16"]
    assert [IN_FLOAT32.precision_to_score(each) for each in fitted] == ["float32", "float32"]
    with pytest.raises(ConfigError, match="which is not installed on each node; pip install"):
        choose_arithmetic([CPU, BARE_CPU], "openvino")


@pytest.mark.parametrize(
    ("text", "native"),
    [
        ("model name\t: x\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx2 avx512f\nbugs\t\t: avx512_bf16\n", False),
        ("Features\t: fp asimd bf16\n", False),
    ],
)
def test_bfloat16_of_a_cpu_is_read_from_its_flags(tmp_path: Path, text: str, native: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_capabilities(tmp_path / "cpuinfo") == (False, native, find_spec("openvino") is not None)
    assert not cpu_capabilities(tmp_path / "missing").has_bfloat16
    says_torch = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert cpu_capabilities().has_bfloat16 == says_torch
