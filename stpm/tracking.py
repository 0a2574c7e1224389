"""Log fits and reports to MLflow, in the driver alone, from what the model store and the report's files hold."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from stpm import storage
from stpm.errors import ConfigError, one_line
from stpm.fitting.task import FitResult
from stpm.models.store import ModelStore
from stpm.names import hide_urls

log = logging.getLogger(__name__)

# MLflow takes no more in one request.
_MAX_METRICS = 1000
_Texts = Mapping[str, str]
# Of metrics: name, value and epoch.
_Points = Sequence[tuple[str, float, int]]
_REPORT = ("report.html", "report.md", "report.json")


class Tracker:
    """What logs to MLflow at a tracking URI; "": nothing. Whatever fails there is a warning.

    The experiment is MLFLOW_EXPERIMENT_NAME, or else the last folder of `source`, a data set or a run.

    Raises:
        ConfigError: if MLflow is not installed, or cannot use the URI.
    """

    def __init__(self, uri: str, source: str) -> None:
        self._uri = uri
        self._experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or source.rstrip("/").rpartition("/")[2]
        if not uri:
            return
        # Otherwise MLflow reports its use to its makers, and asks a server that is down for many minutes.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        # MLflow 3 refuses folders otherwise; only who gives one has one.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        try:
            from mlflow import MlflowClient, entities, exceptions
        except ImportError as error:
            raise ConfigError("--track needs MLflow, which is not installed; pip install 'stpm[mlflow]'") from error
        self._entities = entities
        try:
            self._client = MlflowClient(uri)
        except (exceptions.MlflowException, ImportError) as error:
            raise ConfigError(hide_urls(f"--track is {uri}: {one_line(error)}")) from error

    def log_fits(self, fits: Sequence[FitResult]) -> None:
        """Log each model that is not there as a run: its recipe, losses by epoch, and fit.html."""
        records = [(fit, fit.record) for fit in fits if fit.record and self._uri]
        with self._warnings("models"):
            for fit, record in records:
                # No name of a category holds this quotation mark.
                found = f'tags.model_id = "{record.model_id}" and attributes.status = "FINISHED"'
                if self._client.search_runs([self._experiment_id()], found, max_results=1):
                    continue
                store = ModelStore(fit.task.store)
                points = [("fit_seconds", record.fit.seconds, 0), ("good_count", record.good_count, 0)]
                for epoch in store.history(record).to_pylist():
                    points += [(name, epoch[name], epoch["number"]) for name in ("train_loss", "validation_loss")]
                tags = {"category": record.category, "model_id": record.model_id, "models": store.uri}
                pages = {"fit.html": store.read_file(record, "fit.html").decode()}
                self._log(fit.task.key, tags, asdict(record.recipe), points, pages)

    def log_report(self, out: str) -> None:
        """Log the report in a folder as a run: metrics of each category, as `<category>/<metric>`, and of all."""
        with self._warnings("the report"):
            pages = {name: storage.read(storage.join(out, name)).decode() for name in _REPORT if self._uri}
            if pages:
                contents = json.loads(pages["report.json"])
                every = {f"{name}/": values for name, values in contents["categories"].items()}
                every[""] = contents["mean"] | contents["sum"]
                points = [
                    # MLflow takes no other characters.
                    (re.sub(r"[^/\w .-]", lambda match: f"_{ord(match[0]):x}_", f"{prefix}{name}"), value, 0)
                    for prefix, values in every.items()
                    for name, value in values.items()
                    if isinstance(value, int | float)
                ]
                self._log("report", {"data": contents["data"], "report": out}, contents["recipe"], points, pages)

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        return str(found.experiment_id if found else self._client.create_experiment(self._experiment))

    def _log(self, name: str, tags: _Texts, recipe: Mapping[str, Any], points: _Points, pages: _Texts) -> None:
        run = self._client.create_run(self._experiment_id(), tags=tags, run_name=name).info.run_id
        self._client.log_batch(run, params=[self._entities.Param(key, str(value)) for key, value in recipe.items()])
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(key, value, now, step) for key, value, step in points]
        for start in range(0, len(metrics), _MAX_METRICS):
            self._client.log_batch(run, metrics[start : start + _MAX_METRICS])
        for file, page in pages.items():
            self._client.log_text(run, page, file)
        # Only now is it FINISHED: what fails before is logged again.
        self._client.set_terminated(run)

    @contextmanager
    def _warnings(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001
            # Libraries of artifact stores raise exceptions of their own.
            remedy = "nothing else is lost; the same command fits nothing again, and logs what is not there"
            log.warning(hide_urls(f"{what} cannot be logged to MLflow: {one_line(error)}; {remedy}"))
