"""The benchmark job on some images of real categories: colour PNG, long grey JPEG, and parts at any angle."""

import json
from pathlib import Path

import pytest

from tests.cluster.conftest import run_job

pytestmark = [pytest.mark.cluster, pytest.mark.real_data]

# One of so many images in a row is used: all of them would take minutes.
STEPS = {"bottle": 4, "commutator": 3, "casting": 6}


def test_real_defects_are_found(real_data: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for category, step in STEPS.items():
        for folder in (real_data / category).glob("*/*/"):
            here = data / folder.relative_to(real_data)
            here.mkdir(parents=True)
            for image in sorted(folder.iterdir())[:: 1 if "ground_truth" in folder.parts else step]:
                (here / image.name).symlink_to(image)
    options = ["--teacher", "demo", "--pixels", "65536", "--memory", "1000", "--epochs", "2", "--min-steps", "0"]
    assert run_job("benchmark", "--data", str(data), "--out", str(out), *options).returncode == 0
    found = json.loads((out / "report.json").read_text())["categories"]
    bottle, commutator, casting = (found[category] for category in STEPS)
    assert bottle["image_auroc"] >= 0.99
    assert bottle["pixel_auroc"] >= 0.97
    assert commutator["image_auroc"] >= 0.75
    assert commutator["pixel_auroc"] >= 0.9
    assert commutator["input_size"] == "384x160"
    assert (commutator["good_count"], commutator["defect_count"], commutator["error_count"]) == (23, 18, 0)
    assert casting["image_auroc"] >= 0.85
    assert casting["image_recall"] >= 0.3
    assert casting["image_false_alarm_rate"] <= 0.15
