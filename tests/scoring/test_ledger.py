from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from stpm.errors import ConfigError, DataError
from stpm.scoring.ledger import Counts, Effort, Identity, Ledger

IDENTITY = Identity(("s3://a", "s3://b"), 0.01, "all", False, category="nut")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(str(tmp_path))


def test_a_pass_is_taken_up_by_the_same_and_by_no_other(ledger: Ledger, tmp_path: Path) -> None:
    assert ledger.differences(IDENTITY) == [f"{tmp_path}/run.json is missing"]
    ledger.begin(IDENTITY)
    assert ledger.differences(IDENTITY) == []
    other = dataclasses.replace(IDENTITY, false_alarm_rate=0.05, images=("s3://a",))
    assert ledger.differences(other) == [
        "images was ['s3://a', 's3://b'] and is ['s3://a']",
        "false_alarm_rate was 0.01 and is 0.05",
    ]


def test_a_pass_is_bound_to_its_models(ledger: Ledger, tmp_path: Path) -> None:
    ledger.begin(IDENTITY)
    assert ledger.bind({"nut": "nut-1", "bolt": "bolt-1"}, "store") == []
    written = (tmp_path / "run.json").stat()
    assert ledger.bind({"nut": "nut-1", "bolt": "bolt-1"}, "store") == []
    assert (tmp_path / "run.json").stat() == written
    assert ledger.bind({"nut": "nut-2"}, "store") == ["nut was 'nut-1' and is 'nut-2'", "bolt was 'bolt-1' and is None"]
    assert ledger.bind({"nut": "nut-1", "bolt": "bolt-1"}, "elsewhere") == []
    assert ledger.models() == ("elsewhere", {"nut": "nut-1", "bolt": "bolt-1"})


def test_success_comes_last_and_gives_the_counts(ledger: Ledger, tmp_path: Path) -> None:
    ledger.begin(IDENTITY)
    assert ledger.done() is None
    counts = Counts(10, 2, {"empty": 1}, {"nut": {"rows": 10, "anomalous": 2, "errors": 1}}, 12345)
    with pytest.raises(DataError, match="no record of a pass that has ended"):
        ledger.effort()
    ledger.finish(counts, Effort(images=5, seconds=2.0, steady_images_per_second=9.0))
    assert ledger.done() == counts
    assert counts.failed == 1
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["counts"]["bytes_read"] == 12345
    assert ledger.effort().images_per_second == 2.5
    assert run["identity"]["category"] == "nut"
    assert run["started"] <= run["ended"]
    assert (tmp_path / "_SUCCESS").exists()
    ledger.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert ledger.exists()
    assert ledger.done() is None
    assert ledger.differences(IDENTITY)


@pytest.mark.parametrize("content", ["{", "[1]", '{"other": 1}'])
def test_a_foreign_run_json_is_refused(ledger: Ledger, tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match="is not a run's record"):
        ledger.differences(IDENTITY)
