"""Processes that compute nothing with torch do not import it: that takes seconds and 200 MiB in each of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Those that tasks and actors of the driver are unpickled from.
LIGHT = [
    "stpm.cluster",
    "stpm.fitting.queue",
    "stpm.fitting.task",
    "stpm.scoring.blocks",
    "stpm.scoring.checkpoint",
    "stpm.scoring.decode",
    "stpm.scoring.heatmaps",
    "stpm.scoring.progress",
    "stpm.scoring.remaining",
]


@pytest.mark.parametrize("module", LIGHT)
def test_it_imports_no_network(module: str) -> None:
    script = f"import sys, {module}; print(*sorted({{'torch', 'timm', 'sklearn'}} & sys.modules.keys()))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []
