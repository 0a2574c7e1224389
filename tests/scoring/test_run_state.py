import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from stpm.errors import DataError, OtherRunError, RunDamagedError
from stpm.method.arithmetic import Arithmetic
from stpm.scoring.options import OutputOptions
from stpm.scoring.run_state import RunState, ScoringConfig
from stpm.scoring.run_statistics import CategoryCounts, RunResult, RunStatistics

CONFIG = ScoringConfig(("s3://a", "s3://b"), 0.01, category="nut")


@pytest.fixture
def state(tmp_path: Path) -> RunState:
    return RunState(str(tmp_path))


def test_a_run_differs_from_each_other_configuration(state: RunState, tmp_path: Path) -> None:
    assert state.config_differences(CONFIG) == [f"{tmp_path}/run.json is missing"]
    state.start(CONFIG)
    changes: dict[str, Any] = {"images": ("s3://a",), "category": "", "category_from": "{category}/{name}"}
    changes |= {"allow": ("s3://c",), "false_alarm_rate": 0.05, "output": OutputOptions(heatmaps="none")}
    differences = [
        "images was ('s3://a', 's3://b') and is ('s3://a',)",
        "false_alarm_rate was 0.01 and is 0.05",
        "category was 'nut' and is ''",
        "category_from was '' and is '{category}/{name}'",
        "allow was () and is ('s3://c',)",
        "heatmaps was 'all' and is 'none'",
    ]
    for known in (state, RunState(str(tmp_path))):
        assert known.config_differences(CONFIG) == []
        assert known.config_differences(dataclasses.replace(CONFIG, **changes)) == differences


def test_a_finished_run_has_a_result_and_a_success_file_until_it_is_cleared(state: RunState, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no record of a scored run"):
        state.store_and_model_ids()
    state.start(CONFIG)
    assert not state.is_finished()
    with pytest.raises(DataError, match="no record of a finished run"):
        state.result()
    counts = {"nut": CategoryCounts(rows=10, anomalous=2, errors=1)}
    statistics = RunStatistics(images=5, steady_images_per_second=9.0)
    result = RunResult(10, 2, {"empty": 1}, ["a.png: empty"], counts, 12345, seconds=2.0, statistics=statistics)
    state.finish(result)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "_SUCCESS"}
    read = RunState(str(tmp_path))
    assert read.is_finished()
    assert read.result() == result
    assert (result.error_count, result.steady_images_per_second) == (1, 9.0)
    assert RunResult(seconds=2.0, statistics=RunStatistics(images=5)).steady_images_per_second == 2.5
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["result"]["bytes_read"], run["config"]["category"]) == (12345, "nut")
    assert run["started"] <= run["ended"]
    # A mark is left, but nothing to resume.
    state.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    for known in (state, RunState(str(tmp_path))):
        assert known.exists()
        assert not known.is_finished()
        assert known.config_differences(CONFIG)


@pytest.mark.parametrize("content", ["{", "[1]", '{"other": 1}', "[" * 200_000, None])
def test_a_run_json_of_another_program_is_refused(state: RunState, tmp_path: Path, content: str | None) -> None:
    if content is None:
        (tmp_path / "run.json").mkdir()
    else:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(OtherRunError, match=r"run\.json is not the record of a run"):
        state.config_differences(CONFIG)
    if content:
        # That does not keep --fresh from replacing it.
        state.clear()
        assert RunState(str(tmp_path)).config_differences(CONFIG)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("result", {"statistics": {"image": 1}}),
        ("result.rows", "10"),
        ("config", []),
        ("config.false_alarm_rate", "much"),
        ("models.nut", 1),
        ("triage_images", "many"),
        ("arithmetic.precision", "float16"),
        ("store", 5),
    ],
)
def test_a_value_of_another_type_is_reported(state: RunState, tmp_path: Path, path: str, value: object) -> None:
    state.start(CONFIG)
    state.bind_models({"nut": "nut-1"}, "store")
    state.write(dataclasses.replace(state.record, triage_images=50, arithmetic=Arithmetic()))
    state.finish(RunResult(10))
    values = json.loads((tmp_path / "run.json").read_text())
    parent, _, name = path.rpartition(".")
    (values[parent] if parent else values)[name] = value
    (tmp_path / "run.json").write_text(json.dumps(values))
    with pytest.raises(RunDamagedError, match=rf"run\.json is damaged: .*{name}.*$"):
        _ = RunState(str(tmp_path)).record
