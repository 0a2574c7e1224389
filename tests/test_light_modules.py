"""Processes that do not compute with torch do not import it, which would take seconds and 200 MiB in each."""

import subprocess
import sys

import pytest

from stpm.commands import COMMANDS

# The modules that define tasks and actors without networks.
LIGHT = [
    "stpm.cluster.connection",
    "stpm.fitting.task_queue",
    "stpm.fitting.task",
    "stpm.fitting.worker_group",
    "stpm.scoring.inputs.manifest_blocks",
    "stpm.scoring.stages.write_rows",
    "stpm.scoring.stages.decode",
    "stpm.scoring.stages.draw_heatmaps",
    "stpm.scoring.progress",
    "stpm.scoring.stages.scorer",
]


# Those of actors that run no pipeline.
LIGHTER = ["stpm.cluster.connection", "stpm.cluster.device", "stpm.fitting.task_queue", "stpm.scoring.progress"]


def imported_by(script: str, *argv: str) -> set[str]:
    """Return the names of all modules that a script has imported when it ends."""
    report = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
    ran = subprocess.run([sys.executable, "-c", report + script, *argv], capture_output=True, text=True, check=False)
    return set(ran.stderr.splitlines()[-1].split())


def test_light_modules_import_no_torch() -> None:
    found = imported_by(f"import {', '.join(LIGHT)}")
    assert found >= set(LIGHT)
    assert not found & {"torch", "timm", "sklearn"}


def test_actors_without_a_pipeline_import_no_ray_data_and_scorers_no_scikit_learn() -> None:
    found = imported_by(f"import {', '.join(LIGHTER)}")
    assert found >= set(LIGHTER)
    assert not found & {"ray.data", "pandas", "scipy"}
    assert "sklearn" not in imported_by("import stpm.scoring.stages.detector_cache")


@pytest.mark.parametrize(
    "argv",
    [[], ["--help"], ["scroe"]] + [[name, *rest] for name in COMMANDS for rest in (["--help"], ["--modles", "x"])],
)
def test_help_and_errors_import_nothing_heavy(argv: list[str]) -> None:
    found = imported_by("from stpm.commands import main; main()", *argv)
    assert "stpm.cli" in found
    heavy = {"torch", "ray", "timm", "numpy", "pyarrow", "fsspec", "PIL", "scipy", "sklearn", "matplotlib"}
    assert not found & heavy


@pytest.mark.parametrize("argv", [["fit", "--data"], ["benchmark", "--data"], ["evaluate", "--run"]], ids=" ".join)
def test_a_path_that_leads_nowhere_is_refused_before_anything_heavy_is_imported(argv: list[str]) -> None:
    other = "--models" if argv[0] == "fit" else "--out"
    found = imported_by("from stpm.commands import main; main()", *argv, "/nowhere", other, "/nowhere/o")
    assert "fsspec" in found
    assert not found & {"torch", "ray", "timm", "scipy", "sklearn", "matplotlib"}


@pytest.mark.parametrize("names", [["models", "compare"], ["score", "evaluate", "nightly"], ["fit"]], ids=" ".join)
def test_drivers_import_no_torch_before_ray_starts(names: list[str]) -> None:
    drivers = [COMMANDS[name].run for name in names]
    found = imported_by(f"import pkgutil, stpm.commands; print(*map(pkgutil.resolve_name, {drivers}))")
    assert {"stpm.cli", "stpm.models.store"} <= found
    assert ("ray" in found) == ("models" not in names)
    assert not found & {"torch", "timm"}
