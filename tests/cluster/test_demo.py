"""The README's first command, from the wheel: in an environment of its own, outside of the clone."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.cluster.conftest import HANGS, environment
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.cluster


def run(*command: str | Path) -> str:
    """Run a command that finds no module in the clone; check that it succeeds, and return what it prints."""
    ran = subprocess.run(
        command, env=environment(PYTHONPATH=""), stdout=-1, stderr=-2, text=True, timeout=HANGS, check=False
    )
    print(ran.stdout)
    assert ran.returncode == 0
    return ran.stdout


@pytest.fixture
def programs(working_folder: Path) -> Path:
    """Install the wheel, and give the dependencies of this environment to it; return the folder of its programs."""
    source, home = working_folder / "source", working_folder / "environment"
    source.mkdir()
    # Elsewhere, as in the image: a build leaves files beside the package.
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "stpm", source / "stpm", ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", working_folder, source)
    venv.create(home, with_pip=False)
    (wheel,) = working_folder.glob("*.whl")
    run(*pip, "--python", home / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    here = REPOSITORY / "stpm"
    files = [path.relative_to(here) for path in here.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert len(files) > 100
    assert [name for name in files if not (site / "stpm" / name).exists()] == []
    module = run(home / "bin" / "python", "-c", "import stpm.commands; print(stpm.commands.__file__)")
    assert module.strip() == str(site / "stpm" / "commands.py")
    return home / "bin"


def test_the_demo_finds_its_defects(programs: Path, working_folder: Path) -> None:
    # One of its three products: the others are fitted in the same way.
    run(programs / "stpm", "benchmark", "--categories", "gravel")
    report = json.loads((working_folder / "runs/benchmark/report.json").read_text())
    (gravel,) = report["categories"].values()
    assert gravel["image_auroc"] >= 0.9
    assert gravel["pixel_auroc"] >= 0.9
