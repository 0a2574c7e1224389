from pathlib import Path
from weakref import WeakValueDictionary

import pytest

from tests.scoring.stages.helpers import make_run


@pytest.fixture(autouse=True)
def own_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Share no teacher with other tests."""
    monkeypatch.setattr("stpm.shared_teachers._teachers", WeakValueDictionary())


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, the images of three categories, and `models`, a model of each. Tests must not change it."""
    root = tmp_path_factory.mktemp("run")
    make_run(root)
    return root
