from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from stpm.errors import ConfigError, DataError
from stpm.scoring.resuming.run_state import Counts, Effort, RunConfig, RunState

IDENTITY = RunConfig(("s3://a", "s3://b"), 0.01, "all", False, category="nut")


@pytest.fixture
def run_state(tmp_path: Path) -> RunState:
    return RunState(str(tmp_path))


def test_a_pass_is_taken_up_by_the_same_and_by_no_other(run_state: RunState, tmp_path: Path) -> None:
    assert run_state.differences(IDENTITY) == [f"{tmp_path}/run.json is missing"]
    run_state.begin(IDENTITY)
    assert run_state.differences(IDENTITY) == []
    other = dataclasses.replace(IDENTITY, false_alarm_rate=0.05, images=("s3://a",))
    assert run_state.differences(other) == [
        "images was ['s3://a', 's3://b'] and is ['s3://a']",
        "false_alarm_rate was 0.01 and is 0.05",
    ]


def test_a_pass_is_bound_to_its_models(run_state: RunState, tmp_path: Path) -> None:
    run_state.begin(IDENTITY)
    assert run_state.bind({"nut": "nut-1", "bolt": "bolt-1"}, "store") == []
    written = (tmp_path / "run.json").stat()
    assert run_state.bind({"nut": "nut-1", "bolt": "bolt-1"}, "store") == []
    assert (tmp_path / "run.json").stat() == written
    assert run_state.bind({"nut": "nut-2"}, "store") == [
        "nut was 'nut-1' and is 'nut-2'",
        "bolt was 'bolt-1' and is None",
    ]
    assert run_state.bind({"nut": "nut-1", "bolt": "bolt-1"}, "elsewhere") == []
    assert run_state.models() == ("elsewhere", {"nut": "nut-1", "bolt": "bolt-1"})


def test_success_comes_last_and_gives_the_counts(run_state: RunState, tmp_path: Path) -> None:
    run_state.begin(IDENTITY)
    assert run_state.done() is None
    counts = Counts(10, 2, {"empty": 1}, {"nut": {"rows": 10, "anomalous": 2, "errors": 1}}, 12345)
    with pytest.raises(DataError, match="no record of a pass that has ended"):
        run_state.effort()
    run_state.finish(counts, Effort(images=5, seconds=2.0, steady_images_per_second=9.0))
    assert run_state.done() == counts
    assert counts.failed == 1
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["counts"]["bytes_read"] == 12345
    assert run_state.effort().images_per_second == 2.5
    assert run["config"]["category"] == "nut"
    assert run["started"] <= run["ended"]
    assert (tmp_path / "_SUCCESS").exists()
    run_state.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert run_state.exists()
    assert run_state.done() is None
    assert run_state.differences(IDENTITY)


@pytest.mark.parametrize("content", ["{", "[1]", '{"other": 1}'])
def test_a_foreign_run_json_is_refused(run_state: RunState, tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match="is not a run's record"):
        run_state.differences(IDENTITY)
