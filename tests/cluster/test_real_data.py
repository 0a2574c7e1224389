"""Real categories through the whole job: colour PNG, long grey JPEG, and a part that turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import run_job

pytestmark = [pytest.mark.cluster, pytest.mark.real_data]


def figures(real_data: Path, out: Path, *options: str) -> dict[str, Any]:
    process = run_job("benchmark", "--data", str(real_data), "--out", str(out), "--teacher", "demo", *options)
    assert process.returncode == 0
    found: dict[str, Any] = json.loads((out / "report.json").read_text())["categories"]
    return found


def test_real_defects_are_found(real_data: Path, tmp_path: Path) -> None:
    short = ("--pixels", "65536", "--epochs", "2", "--min-steps", "0")
    found = figures(real_data, tmp_path, "--categories", "bottle,commutator", *short)
    bottle, commutator = found["bottle"], found["commutator"]
    assert bottle["image_auroc"] >= 0.99
    assert bottle["pixel_auroc"] >= 0.98
    assert commutator["image_auroc"] >= 0.8
    assert commutator["pixel_auroc"] >= 0.9
    assert commutator["input_size"] == "384x160"
    assert (commutator["good_count"], commutator["defect_count"], commutator["error_count"]) == (69, 52, 0)


def test_defects_of_a_part_that_turns_are_found(real_data: Path, tmp_path: Path) -> None:
    casting = figures(real_data, tmp_path, "--categories", "casting", "--student", "none")["casting"]
    assert casting["image_auroc"] >= 0.95
    assert casting["image_recall"] >= 0.5
    assert casting["image_false_alarm_rate"] <= 0.1
