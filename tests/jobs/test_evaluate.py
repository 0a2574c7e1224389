"""The evaluate job's steps and refusals, without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stpm.errors import ConfigError
from stpm.evaluation.gate import Gate, Requirement
from stpm.evaluation.options import EvaluateOptions, EvaluationOptions, GateOptions
from stpm.evaluation.report import Report
from stpm.jobs.evaluate import evaluate_category, publish_report, run_evaluate
from tests.evaluation.runs import result, scored_run


def evaluate(**options: str) -> int:
    return run_evaluate(EvaluateOptions(**options), EvaluationOptions(), GateOptions())


def test_a_run_folder_that_is_none_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert evaluate(scores=str(tmp_path / "nowhere")) == 3
    assert "nowhere: no scores here" in caplog.text
    with pytest.raises(ConfigError, match="--scores is missing"):
        EvaluateOptions()


def test_a_pass_that_has_not_come_so_far_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = scored_run(tmp_path).output
    Path(output.home).mkdir(parents=True)
    assert evaluate(scores=output.out) == 3
    assert "no record of a scored pass" in caplog.text


def test_the_models_that_made_the_scores_are_asked_for_and_no_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = scored_run(tmp_path).output
    Path(output.home).mkdir(parents=True)
    run = {"config": {}, "models": {"nut": "nut-before"}, "store": str(tmp_path / "models"), "counts": {}}
    (Path(output.home) / "run.json").write_text(json.dumps(run))
    assert evaluate(scores=output.out) == 3
    assert "this run has not ended" in caplog.text
    (Path(output.home) / "_SUCCESS").touch()
    assert evaluate(scores=output.out) == 3
    assert "models: no model nut-before for category 'nut'" in caplog.text


def test_a_baseline_is_read_before_anything_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"baseline nothing\.json cannot be read"):
        run_evaluate(EvaluateOptions(scores="nowhere"), EvaluationOptions(), GateOptions(baseline="nothing.json"))


def test_a_category_is_evaluated_and_published_and_held_against_the_gate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    category = scored_run(tmp_path / "scored")
    found = evaluate_category(category.output, result("nut", 0, None, None).model, {}, "model")
    assert Path(category.output.out, "gallery/seed-0/nut.png").is_file()
    out = str(tmp_path / "report")
    report = Report("data", [found])
    assert publish_report(report, out, Gate((), {})) == 0
    assert {path.name for path in Path(out).iterdir()} == {"report.html", *report.files()}
    gate = Gate((Requirement("nut", "pixel_auroc", 1.0),), {})
    assert publish_report(report, out, gate) == 2
    assert any(line.startswith("falls short: nut.pixel_auroc is 0.") for line in caplog.messages)
