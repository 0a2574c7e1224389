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
from stpm.errors import ConfigError, StpmError, one_line
from stpm.fitting.task import FitResult
from stpm.models.store import ModelStore
from stpm.names import hide_urls
from stpm.options import TrackingOptions

log = logging.getLogger(__name__)

# MLflow takes no more in one request.
_MAX_METRICS = 1000
# A name of a metric, its value, and the epoch.
_Point = tuple[str, float, int]


class Tracker:
    """An experiment of an MLflow server. Without `--track` it does nothing.

    Args:
        options: the server, and the experiment.
        source: the data set or run; its last folder names the experiment that has no other name.

    Raises:
        ConfigError: if MLflow is not installed, or cannot use the URI.
    """

    def __init__(self, options: TrackingOptions, source: str) -> None:
        self._uri = options.track
        self._experiment = options.experiment or source.rstrip("/").rpartition("/")[2] or "stpm"
        if not options.track:
            return
        # MLflow would report to its makers that it is used, and ask a server that is down for many minutes.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        try:
            from mlflow import MlflowClient, entities
            from mlflow.exceptions import MlflowException
        except ImportError as error:
            raise ConfigError("--track needs MLflow, which is not installed; pip install 'stpm[mlflow]'") from error
        self._entities, self._errors = entities, (MlflowException, OSError, StpmError)
        try:
            self._client = MlflowClient(options.track)
        except self._errors as error:
            raise ConfigError(hide_urls(f"--track is {options.track}: {one_line(error)}")) from error

    def log_fits(self, fits: Sequence[FitResult]) -> None:
        """Log each fitted model that the experiment does not have, as a run of its own."""
        with self._warnings("fits"):
            from stpm.fitting.outliers import PAGE

            for fit in fits if self._uri else ():
                if not (record := fit.record):
                    continue
                # No name of a category holds this quotation mark.
                query = f'tags.model_id = "{record.model_id}" and attributes.status = "FINISHED"'
                if self._client.search_runs([self._experiment_id], query, max_results=1):
                    continue
                store = ModelStore(fit.task.store)
                points = [("fit_seconds", record.fit.seconds, 0), ("good_count", record.good_count, 0)]
                for epoch in store.history(record).to_pylist():
                    points += [(name, epoch[name], epoch["number"]) for name in ("train_loss", "validation_loss")]
                pages = {PAGE: store.read_file(record, PAGE)}
                tags = {"category": record.category, "model_id": record.model_id, "models": store.uri}
                self._log(fit.task.key, tags, asdict(record.recipe), points, pages)

    def log_report(self, out: str) -> None:
        """Log the report in a folder as a run: the metrics of each category, `<category>/<metric>`, and of all."""
        with self._warnings("the report"):
            if self._uri:
                files = ("report.html", "report.md", "report.json")
                pages = {name: storage.read(storage.join(out, name)) for name in files}
                contents = json.loads(pages["report.json"])
                points = [
                    (f"{name and f'{name}/'}{metric}", value, 0)
                    for name, values in {**contents["categories"], "": contents["mean"] | contents["sum"]}.items()
                    for metric, value in values.items()
                    if isinstance(value, int | float)
                ]
                tags = {"data": contents["data"], "report": out}
                self._log(f"report of {self._experiment}", tags, contents["recipe"], points, pages)

    @property
    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        return str(found.experiment_id if found else self._client.create_experiment(self._experiment))

    def _log(
        self,
        name: str,
        tags: Mapping[str, str],
        recipe: Mapping[str, Any],
        points: Sequence[_Point],
        pages: Mapping[str, bytes],
    ) -> None:
        run = self._client.create_run(self._experiment_id, tags=tags, run_name=name).info.run_id
        params = [self._entities.Param(key, _text(value)) for key, value in recipe.items()]
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(_metric_name(key), value, now, step) for key, value, step in points]
        self._client.log_batch(run, params=params)
        for start in range(0, len(metrics), _MAX_METRICS):
            self._client.log_batch(run, metrics[start : start + _MAX_METRICS])
        for file, page in pages.items():
            self._client.log_text(run, page.decode(), file)
        # Only now is it FINISHED: what fails before is logged again.
        self._client.set_terminated(run)

    @contextmanager
    def _warnings(self, what: str) -> Iterator[None]:
        """Warn where MLflow fails: what it should log is in the store."""
        try:
            yield
        except self._errors as error:
            remedy = "nothing else is lost; the same command fits nothing again, and logs what is not there"
            log.warning(hide_urls(f"{what} cannot be logged to MLflow at {self._uri}: {one_line(error)}; {remedy}"))


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _metric_name(name: str) -> str:
    """Replace the characters that MLflow does not take."""
    return re.sub(r"[^/\w .-]", lambda match: f"_{ord(match[0]):x}_", name)
