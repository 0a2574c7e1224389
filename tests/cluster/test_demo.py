"""The README's first command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.conftest import run_job

pytestmark = pytest.mark.cluster


def test_the_demo_finds_its_defects(working_folder: Path) -> None:
    process = run_job("benchmark")
    assert process.returncode == 0
    report = json.loads((working_folder / "runs/benchmark/report.json").read_text())
    assert set(report["categories"]) == {"brick", "grass", "gravel"}
    for name, values in report["categories"].items():
        assert values["image_auroc"] >= 0.9, name
        assert values["pixel_auroc"] >= 0.9, name
        assert (working_folder / f"runs/benchmark/gallery/seed-0/{name}.png").exists()
