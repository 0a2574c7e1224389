"""The evaluate job's steps and refusals, without Ray."""

import dataclasses
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from stpm import storage
from stpm.data.mvtec import Category
from stpm.errors import ConfigError, DataError, ModelError, OtherRunError, RunDamagedError
from stpm.evaluation.evaluate import evaluate_category, find_labels_without_model, publish_report
from stpm.evaluation.gate import Gate
from stpm.evaluation.options import EvaluateOptions, ReportOptions
from stpm.evaluation.report import CategoryResult, Failure, Report
from stpm.jobs import benchmark
from stpm.jobs import evaluate as evaluate_job
from stpm.jobs.evaluate import run_evaluate
from stpm.method.recipe import Recipe
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.options import ClusterOptions
from stpm.scoring.options import ScoreOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import open_rows
from stpm.scoring.run_state import RunState, ScoringConfig
from tests.datasets import make_output, write_rows
from tests.evaluation.runs import CALIBRATION, finish_run, result, scored_run
from tests.models.test_store import save


def evaluate(**options: str) -> int:
    return run_evaluate(EvaluateOptions(**options), ReportOptions(), ClusterOptions())


def test_what_cannot_be_evaluated_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"baseline nothing\.json cannot be read"):
        run_evaluate(EvaluateOptions(run="nowhere"), ReportOptions(baseline="nothing.json"), ClusterOptions())
    output = scored_run(tmp_path).output
    Path(output.state_folder).mkdir(parents=True)
    with pytest.raises(DataError, match="no record of a scored run"):
        evaluate(run=output.folder)
    finish_run(output, "nut-before", str(tmp_path / "models"))
    (Path(output.state_folder) / "_SUCCESS").unlink()
    with pytest.raises(DataError, match="this run is not finished"):
        evaluate(run=output.folder)


def test_each_run_that_moved_has_its_own_models(tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {}
    for seed in (0, 1):
        name = f"seed-{seed}"
        record = save(ModelStore(str(tmp_path / "models" / name)), dataclasses.replace(tiny, seed=seed))
        finish_run(RunOutput.named(str(tmp_path), name), record.model_id, "/gone")
        expected[name] = [record]
    found: dict[str, list[ModelRecord]] = {}

    def keep(output: RunOutput, records: list[ModelRecord], *_: object) -> list[CategoryResult]:
        found[output.name] = records
        return []

    monkeypatch.setattr(evaluate_job, "connected", nullcontext)
    monkeypatch.setattr(evaluate_job, "evaluate_categories", keep)
    with pytest.raises(ModelError, match="/gone: no model "):
        evaluate(run=str(tmp_path))
    assert evaluate(run=str(tmp_path), models=str(tmp_path / "models")) == 0
    assert found == expected
    # With one run, its store itself will do.
    shutil.rmtree(tmp_path / "runs" / "seed-0")
    found.clear()
    assert evaluate(run=str(tmp_path), models=str(tmp_path / "models" / "seed-1")) == 0
    assert found == {"seed-1": expected["seed-1"]}


def test_two_runs_of_a_category_and_seed_are_refused(tmp_path: Path, tiny: Recipe) -> None:
    store = ModelStore(str(tmp_path / "models"))
    for name in ("001", "002"):
        finish_run(RunOutput.named(str(tmp_path), name), save(store, tiny).model_id, store.uri)
    with pytest.raises(DataError, match=r": 2 runs have scored nut with seed 0; only runs of different seeds can be"):
        evaluate(run=str(tmp_path))


def test_labels_without_a_model_are_failures_and_a_run_without_labels_is_reported(
    tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = scored_run(tmp_path / "labelled").output
    assert find_labels_without_model(output, {"nut"}) == []
    assert find_labels_without_model(output, {"bolt"}) == [Failure("nut", "no model scored its 12 images with a label")]
    output = scored_run(tmp_path, unlabelled=12).output
    store = ModelStore(str(tmp_path / "models"))
    record = save(store, tiny)
    finish_run(output, record.model_id, store.uri)
    monkeypatch.setattr(evaluate_job, "connected", nullcontext)
    monkeypatch.setattr(
        evaluate_job, "evaluate_categories", lambda *_: [evaluate_category(output, record, {}, CALIBRATION, "model")]
    )
    with pytest.raises(DataError, match="no image has a label; score a table that has the column `label`"):
        evaluate(run=output.folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", "{", r"run\.json is .*; .*score its images again: "),
        ("seed-0_1.parquet", "PAR1", r"^/.*seed-0_1\.parquet is damaged: .*; restore the files, or score .*$"),
    ],
)
def test_a_damaged_run_is_to_be_scored_again(
    tmp_path: Path, tiny: Recipe, file: str, content: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, store = scored_run(tmp_path).output, ModelStore(str(tmp_path / "models"))
    finish_run(output, save(store, tiny).model_id, store.uri)
    folder = output.state_folder if file == "run.json" else output.scores
    storage.publish(f"{folder}/{file}", content.encode())
    monkeypatch.setattr(evaluate_job, "connected", nullcontext)
    with pytest.raises((OtherRunError, RunDamagedError), match=message):
        evaluate(run=output.folder)


def split() -> benchmark.TestSplit:
    return benchmark.TestSplit("data", [Category("nut", (), ())], ScoreOptions(), "model", ClusterOptions())


def test_the_benchmark_starts_a_damaged_run_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = scored_run(tmp_path).output
    RunState(output.state_folder).start(ScoringConfig((), 0.01))
    caplog.set_level("INFO")
    steps: list[str] = []

    def score(*_: object) -> None:
        steps.append("score")
        if not output.files():
            write_rows(output, make_output(1))

    def evaluate_rows(*_: object) -> list[CategoryResult]:
        steps.append("evaluate")
        open_rows(output).to_table()
        return [result("nut", 0, None, None)]

    (file,) = output.files()
    storage.publish(file, b"PAR1")
    monkeypatch.setattr(benchmark.TestSplit, "score", score)
    monkeypatch.setattr(benchmark, "evaluate_categories", evaluate_rows)
    assert len(split().results([], ModelStore("models"), output)) == 1
    assert steps == ["score", "evaluate", "score", "evaluate"]
    assert f"{file} is damaged: " in caplog.text
    assert "; seed-0 is scored again" in caplog.text
    # The other run of the folder is kept.
    assert RunOutput.named(output.folder, "seed-1").files()


def test_the_benchmark_replaces_no_file_that_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = scored_run(tmp_path).output
    state = f"{output.state_folder}/run.json"
    arguments = [result("nut", 0, None, None).model], ModelStore(str(tmp_path / "models")), output
    with pytest.raises(ConfigError, match=r"exists, but no .*run\.json shows that a run wrote it; name another --out"):
        split().results(*arguments)
    storage.publish(state, b"mine")
    monkeypatch.setattr(benchmark.TestSplit, "score", lambda *_: print(RunState(output.state_folder).is_finished()))
    with pytest.raises(
        OtherRunError,
        match=rf"run\.json is not the record of a run .*; remove {output.state_folder}, .* --out$",
    ):
        split().results(*arguments)
    assert storage.read(state) == b"mine"
    assert output.files()


def test_without_test_images_metrics_are_undefined(tmp_path: Path) -> None:
    output = RunOutput.named(str(tmp_path / "run"), "seed-0")
    model = result("nut", 0, None, None).model
    split().score([model], ModelStore(str(tmp_path / "models")), output)
    assert not output.files()
    report = Report("data", [evaluate_category(output, model, {}, CALIBRATION, "model")])
    assert publish_report(report, str(tmp_path), Gate((), {})) == 0
    undefined = "nut: image_auroc, image_average_precision, image_f1_max undefined: no defective ones among 0"
    assert undefined in report.text()
    output = scored_run(tmp_path).output
    with pytest.raises(ConfigError, match=r"exists, but no .*run\.json shows that a run wrote it; name another --out"):
        split().score([model], ModelStore(str(tmp_path / "models")), output)
    assert output.files()
