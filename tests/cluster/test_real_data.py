"""Two real categories: colour PNG and grey JPEG, through the whole job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.conftest import run_job

pytestmark = [pytest.mark.cluster, pytest.mark.real_data]


def test_real_defects_are_found(real_data: Path, tmp_path: Path) -> None:
    process = run_job(
        "benchmark",
        *("--data", str(real_data), "--out", str(tmp_path), "--teacher", "demo"),
    )
    assert process.returncode == 0
    categories = json.loads((tmp_path / "report.json").read_text())["categories"]
    bottle, commutator = categories["bottle"], categories["commutator"]
    assert bottle["image_auroc"] >= 0.98
    assert bottle["pixel_auroc"] >= 0.97
    # A hard one: what must hold is that it is far from chance.
    assert commutator["image_auroc"] >= 0.6
    assert commutator["pixel_auroc"] >= 0.8
    assert (commutator["good_count"], commutator["defect_count"], commutator["error_count"]) == (69, 52, 0)
