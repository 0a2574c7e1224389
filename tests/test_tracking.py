"""Fits and reports in MLflow, read back by its client from a folder; a server that is down, and MLflow missing."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from stpm import storage
from stpm.errors import ConfigError
from stpm.evaluation.evaluate import publish_report
from stpm.evaluation.gate import Gate
from stpm.evaluation.report import Report
from stpm.fitting.options import FitOptions
from stpm.fitting.task import FitResult
from stpm.method.recipe import Recipe
from stpm.models.store import ModelStore
from stpm.tracking import Tracker
from tests.evaluation.runs import result
from tests.fitting.test_fit_categories import categories, fit
from tests.models.test_store import save


@pytest.fixture
def uri(tmp_path: Path) -> str:
    pytest.importorskip("mlflow", reason="MLflow is not installed: nothing was logged to it")
    return f"file://{tmp_path}/mlruns"


def runs(uri: str, experiment: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id], order_by=["start_time"]))


def page(uri: str, run: Any, name: str) -> str:
    from mlflow import artifacts

    return Path(artifacts.download_artifacts(f"{run.info.artifact_uri}/{name}", tracking_uri=uri)).read_text()


@pytest.mark.usefixtures("fitted_keys")
def test_each_model_is_one_run_with_recipe_losses_and_page(tmp_path: Path, any_model: Recipe, uri: str) -> None:
    fits = fit(categories(tmp_path, **{"nut": 8, "bolt (new)": 8}), any_model, tmp_path / "models")
    for _ in range(2):
        Tracker(uri, f"{tmp_path}/data/").log_fits([*fits, FitResult(fits[0].task, reason="failed")])
    logged = runs(uri, "data")
    assert sorted(run.data.tags["category"] for run in logged) == ["bolt (new)", "nut"]
    store = ModelStore(f"{tmp_path}/models")
    for run in logged:
        record = store.record(run.data.tags["category"])
        assert (run.info.run_name, run.info.status) == (f"{record.category} (seed 0)", "FINISHED")
        assert (run.data.tags["model_id"], run.data.tags["models"]) == (record.model_id, store.uri)
        expected = dataclasses.asdict(record.recipe)
        assert run.data.params == {name: str(value) for name, value in expected.items()}
        assert run.data.metrics["good_count"] == 8
        from mlflow import MlflowClient

        for name in ("train_loss", "validation_loss"):
            history = MlflowClient(uri).get_metric_history(run.info.run_id, name)
            losses = store.history(record).to_pydict().get(name, [])
            assert [(each.step, each.value) for each in history] == list(enumerate(losses, 1))
        assert page(uri, run, "fit.html").encode() == store.read_file(record, "fit.html")


def test_a_report_is_a_run_with_all_metrics(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stpm.tracking._MAX_METRICS", 7)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "plant 7")
    report = Report("/data", [result("nut", 0, 0.75, 0.5), result("bolt (new)", 0, 1.0, None)])
    publish_report(report, f"{tmp_path}/out", Gate((), {}))
    Tracker(uri, "/data").log_report(f"{tmp_path}/out")
    (run,) = runs(uri, "plant 7")
    contents = json.loads(storage.read(f"{tmp_path}/out/report.json"))
    shown = {"nut/": contents["categories"]["nut"], "bolt _28_new_29_/": contents["categories"]["bolt (new)"]}
    shown[""] = contents["mean"] | contents["sum"]
    numbers = {
        f"{prefix}{name}": value
        for prefix, values in shown.items()
        for name, value in values.items()
        if type(value) in (int, float)
    }
    assert run.data.metrics == numbers
    assert {"nut/image_auroc", "image_auroc", "found_count"} < numbers.keys()
    assert run.data.params["epochs"] == str(contents["recipe"]["epochs"])
    for name in ("report.html", "report.md", "report.json"):
        assert page(uri, run, name).encode() == storage.read(f"{tmp_path}/out/{name}")


def test_a_server_that_is_down_is_a_warning_and_what_broke_off_is_logged_again(
    tmp_path: Path,
    uri: str,
    tiny: Recipe,
    fitted_keys: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    fits = fit(categories(tmp_path, nut=8), tiny, tmp_path / "models")
    caplog.clear()
    Tracker("http://127.0.0.1:9", "data").log_fits(fits)
    (message,) = caplog.messages
    assert message.startswith(
        "models cannot be logged to MLflow: MlflowException: API request to http://127.0.0.1:9/... failed"
    )
    assert "the same command fits nothing again, and logs what is not there" in message
    assert "\n" not in message
    tracker = Tracker(uri, "data")
    with monkeypatch.context() as broken:
        broken.setattr(tracker._client, "log_text", Mock(side_effect=RuntimeError("NoCredentialsError: none")))
        tracker.log_fits(fits)
        tracker.log_report(f"{tmp_path}/nowhere")
    # The error of a library of artifacts.
    assert "models cannot be logged to MLflow: RuntimeError: NoCredentialsError: none" in caplog.messages[1]
    assert "the report cannot be logged" in caplog.messages[2]
    tracker.log_fits(fits)
    assert [run.info.status for run in runs(uri, "data")] == ["RUNNING", "FINISHED"]


def test_without_a_uri_nothing_happens_and_without_mlflow_an_error_names_the_extra(
    tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    tracker = Tracker("", "data")
    record = save(ModelStore(str(tmp_path)), tiny)
    tracker.log_fits([FitResult(None, record)])  # type: ignore[arg-type]
    tracker.log_report("nowhere")
    with pytest.raises(
        ConfigError, match=r"--track needs MLflow, which is not installed; pip install 'stpm\[mlflow\]'"
    ):
        Tracker("http://mlflow:5000", "data")


@pytest.mark.usefixtures("uri")
def test_a_uri_that_mlflow_cannot_use_is_refused() -> None:
    with pytest.raises(ConfigError, match="--track is foo://SECRET: ") as caught:
        Tracker("foo://SECRET", "data")
    assert "\n" not in str(caught.value)


def test_a_uri_with_a_password_and_tracking_without_a_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"http://mlflow/\.\.\.: this URI holds a user or password"):
        FitOptions("data", "models", track="http://me:SECRET@mlflow")
    with pytest.raises(ConfigError, match="--track is given with --add-good"):
        FitOptions("data", "models", add_good="marks.jsonl", track="http://mlflow")
