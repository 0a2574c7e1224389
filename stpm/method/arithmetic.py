"""What computes features, and in which precision. Processes without torch import this module."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from stpm.errors import ConfigError
from stpm.method.recipe import Precision, WantedPrecision
from stpm.options import Backend, WantedBackend


@dataclass(frozen=True)
class Arithmetic:
    """What computes features: one for all devices of a run.

    Scores have the same bits where it is equal, with as many threads on the same kind of device. See docs/recipes.md
    for how much they differ elsewhere.

    Args:
        backend: PyTorch, or on CPUs OpenVINO.
        precision: number format of convolutions, where neither a recipe nor a model asks for another.
    """

    backend: Backend = "pytorch"
    precision: Precision = "float32"

    def precision_to_fit(self, wanted: WantedPrecision) -> Precision:
        """Return the precision of a fit, as its recipe wants it."""
        return self.precision if wanted == "auto" else wanted

    def precision_to_score(self, fitted: Precision) -> Precision:
        """Return the precision that scores with a model: that of its fit, or float32 where that is not native."""
        return "bfloat16" if self.precision == fitted == "bfloat16" else "float32"

    def __str__(self) -> str:
        return f"{self.backend} in {self.precision}"


def warn_of_other_arithmetic(now: Arithmetic, calibrated: Iterable[tuple[Backend, Precision]]) -> str:
    """Warn if models were calibrated with another backend or precision than scores with them now; "" if none was."""
    others = {
        str(Arithmetic(backend, precision))
        for backend, precision in calibrated
        if (backend, precision) != (now.backend, now.precision_to_score(precision))
    }
    if not others:
        return ""
    return (
        f"{now} scores models that {' and '.join(sorted(others))} calibrated: a few decisions near the threshold may "
        "differ; where that matters, fit on the kind of machine that scores, or give the --backend of the fit"
    )


class Capabilities(NamedTuple):
    """What a device can compute with; emulated, bfloat16 is slower than float32, or fails."""

    is_gpu: bool
    has_bfloat16: bool
    has_openvino: bool


def cpu_capabilities(cpuinfo: Path = Path("/proc/cpuinfo")) -> Capabilities:
    """Return what this machine's CPU can compute with, as the kernel describes it."""
    flags = re.search(r"^flags\s*:(.*)", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    has_bfloat16 = bool(flags and {"avx512_bf16", "amx_bf16"} & set(flags[1].split()))
    return Capabilities(False, has_bfloat16, find_spec("openvino") is not None)


def choose_arithmetic(
    devices: Collection[Capabilities],
    backend: WantedBackend,
    before: Arithmetic | None = None,
) -> Arithmetic:
    """Choose what all devices of a run can compute with: bfloat16 where it is native.

    On GPUs PyTorch computes in any case; on CPUs, by `auto`, OpenVINO where it is installed. What the run has computed
    with `before` is kept if the devices can.

    Raises:
        ConfigError: if OpenVINO is wanted on CPUs and not installed everywhere.
    """
    has_openvino = all(device.has_openvino and not device.is_gpu for device in devices)
    if backend == "openvino" and not has_openvino and not any(device.is_gpu for device in devices):
        where = "here" if len(devices) == 1 else "on each node"
        raise ConfigError(f"--backend is openvino, which is not installed {where}; pip install 'stpm[openvino]'")
    keeps_pytorch = backend == "pytorch" or (backend == "auto" and before is not None and before.backend == "pytorch")
    has_bfloat16 = all(device.has_bfloat16 for device in devices) and (before is None or before.precision == "bfloat16")
    return Arithmetic(
        "openvino" if has_openvino and not keeps_pytorch else "pytorch",
        "bfloat16" if has_bfloat16 else "float32",
    )
