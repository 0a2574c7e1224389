"""The benchmark, at small size: the score job is nearly as near to its bare loop as bench/RESULTS-speed.md states."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import environment
from tests.conftest import REPOSITORY
from tests.datasets import make_category

pytestmark = pytest.mark.cluster

# The job's images per CPU second, of the loop's. Other work on the machine changes the ratio of wall times far more,
# but this one too: on a core that it shares, a process takes up to a quarter longer for the same work.
STATED = 0.65
IMAGES = 800


def test_scoring_is_as_near_to_its_limit_as_stated(tmp_path: Path) -> None:
    make_category(str(tmp_path), "nut", train=24, shape=(300, 300))
    options = ["--data", str(tmp_path), "--category", "nut", "--small", "--repeats", "1", "--images", str(IMAGES)]
    ran = subprocess.run(
        [sys.executable, "bench/run.py", "score", "first", *options],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    print(ran.stdout, ran.stderr, sep="\n")
    assert ran.returncode == 0
    measured = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith('{"section"')]
    assert {each["section"] for each in measured} == {"score", "first"}
    (scoring,) = (each for each in measured if each["unit"] == "images per CPU second")
    assert scoring["job"] / scoring["limit"] >= 0.6 * STATED
