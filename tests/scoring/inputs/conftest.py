from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    """Return the URI of an empty folder, on a local disk or in an in-memory filesystem."""
    return str(tmp_path) if request.param == "local" else memory
