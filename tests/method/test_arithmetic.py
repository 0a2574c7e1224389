from __future__ import annotations

import pytest

from stpm.errors import ConfigError
from stpm.method.backend import resolve_backend
from stpm.options import Backend, WantedBackend


@pytest.mark.parametrize(
    ("wanted", "installed", "on_gpu", "backend"),
    [
        ("auto", True, False, "openvino"),
        ("auto", False, False, "pytorch"),
        ("auto", True, True, "pytorch"),
        ("pytorch", True, False, "pytorch"),
        ("openvino", True, False, "openvino"),
        ("openvino", False, True, "pytorch"),
    ],
)
def test_backend_follows_the_device_and_what_is_installed(
    wanted: WantedBackend, installed: bool, on_gpu: bool, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stpm.method.backend.find_spec", lambda name: object() if installed else None)
    assert resolve_backend(wanted, on_gpu=on_gpu) == backend


def test_openvino_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stpm.method.backend.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="which is not installed here; pip install"):
        resolve_backend("openvino", on_gpu=False)
