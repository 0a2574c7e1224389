"""Choose what computes features: PyTorch, or OpenVINO on a CPU. Processes without torch import this module."""

from __future__ import annotations

from importlib.util import find_spec

from stpm.errors import ConfigError
from stpm.options import Backend, WantedBackend


def resolve_backend(wanted: WantedBackend, *, on_gpu: bool) -> Backend:
    """Replace `auto` by OpenVINO on a CPU where it is installed. On a GPU PyTorch computes in any case.

    Raises:
        ConfigError: if OpenVINO is wanted on a CPU and is not installed.
    """
    if on_gpu or wanted == "pytorch":
        return "pytorch"
    if find_spec("openvino"):
        return "openvino"
    if wanted == "openvino":
        raise ConfigError("--backend is openvino, which is not installed here; pip install 'stpm[openvino]'")
    return "pytorch"
