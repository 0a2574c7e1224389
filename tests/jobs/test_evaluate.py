"""The evaluate job's steps and refusals, without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stpm.data.mvtec import Category
from stpm.errors import ConfigError, DataError, ModelError
from stpm.evaluation.gate import Gate, Requirement
from stpm.evaluation.options import EvaluateOptions, ReportOptions
from stpm.evaluation.report import Report
from stpm.jobs.benchmark import _score as score_tests
from stpm.jobs.evaluate import evaluate_category, publish_report, run_evaluate
from stpm.models.store import ModelStore
from stpm.scoring.options import ScoreOptions
from stpm.scoring.output import RunOutput
from tests.evaluation.runs import result, scored_run


def evaluate(**options: str) -> int:
    return run_evaluate(EvaluateOptions(**options), ReportOptions())


def test_a_missing_run_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no scores here"):
        evaluate(run=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="--run is missing"):
        EvaluateOptions()


def test_a_run_without_models_is_reported(tmp_path: Path) -> None:
    output = scored_run(tmp_path).output
    Path(output.state_folder).mkdir(parents=True)
    with pytest.raises(DataError, match="no record of a scored run"):
        evaluate(run=output.folder)


def test_only_the_models_that_scored_the_run_are_used(tmp_path: Path) -> None:
    output = scored_run(tmp_path).output
    Path(output.state_folder).mkdir(parents=True)
    run = {"config": {}, "models": {"nut": "nut-before"}, "store": str(tmp_path / "models"), "result": {}}
    (Path(output.state_folder) / "run.json").write_text(json.dumps(run))
    with pytest.raises(DataError, match="this run is not finished"):
        evaluate(run=output.folder)
    (Path(output.state_folder) / "_SUCCESS").touch()
    with pytest.raises(ModelError, match="models: no model nut-before for category 'nut'"):
        evaluate(run=output.folder)


def test_an_unreadable_baseline_is_reported_first() -> None:
    with pytest.raises(ConfigError, match=r"baseline nothing\.json cannot be read"):
        run_evaluate(EvaluateOptions(run="nowhere"), ReportOptions(baseline="nothing.json"))


def test_without_test_images_metrics_are_undefined(tmp_path: Path) -> None:
    output = RunOutput.named(str(tmp_path / "run"), "seed-0")
    model = result("nut", 0, None, None).model
    store = ModelStore(str(tmp_path / "models"))
    # The benchmark scores nothing.
    score_tests("data", [Category("nut", (), ())], [model], store, ScoreOptions(), output, "auto")
    report = Report("data", [evaluate_category(output, model, {}, "model")])
    assert publish_report(report, str(tmp_path), Gate((), {})) == 0
    undefined = "nut: image_auroc, image_average_precision, image_f1_max undefined: no defective ones among 0"
    assert undefined in report.text()


def test_a_category_is_evaluated_published_and_checked_against_the_gate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    category = scored_run(tmp_path / "scored")
    found = evaluate_category(category.output, result("nut", 0, None, None).model, {}, "model")
    assert Path(category.output.folder, "gallery/seed-0/nut.png").is_file()
    out = str(tmp_path / "report")
    report = Report("data", [found])
    assert publish_report(report, out, Gate((), {})) == 0
    assert {path.name for path in Path(out).iterdir()} == {"report.html", *report.files()}
    gate = Gate((Requirement("nut", "pixel_auroc", 1.0),), {})
    assert publish_report(report, out, gate) == 2
    assert any(line.startswith("falls short: nut.pixel_auroc is 0.") for line in caplog.messages)
