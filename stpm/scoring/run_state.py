"""The state of a run, from which another run can resume it: run.json, and `_SUCCESS` once it is finished."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from stpm import storage
from stpm.errors import DataError, OtherRunError, RunDamagedError
from stpm.lease import Fence, check
from stpm.method.arithmetic import Arithmetic
from stpm.models.libraries import installed_versions
from stpm.records import convert, parse_json, to_json
from stpm.scoring.options import OutputOptions
from stpm.scoring.run_statistics import RunResult
from stpm.times import timestamp


@dataclass(frozen=True)
class ScoringConfig:
    """All that decides a run's rows, except the models.

    Args:
        images: the sources.
        false_alarm_rate: for the thresholds.
        region_rate: for those of pixels.
        output: what is written for each image.
        category: of every image, or "".
        category_from: pattern of the images' paths, or "".
        allow: prefixes that the URIs in a table may have.
        manifest: digest of the images, if they do not come from sources.
    """

    images: tuple[str, ...]
    false_alarm_rate: float
    output: OutputOptions = field(default_factory=OutputOptions)
    region_rate: float = 0.1
    category: str = ""
    category_from: str = ""
    allow: tuple[str, ...] = ()
    manifest: str = ""


@dataclass(frozen=True)
class RunRecord:
    """The content of run.json; a run fills in one field after the other.

    Args:
        config: None: there is no run to resume, or its files are being removed.
        versions: of the libraries at its start, by name.
        models: the model id of each category that has one; None: no models are bound yet.
        store: URI of the model store, which may change between runs.
        attempt: number of the attempt whose rows count; -1: none has begun to score.
        arithmetic: what has computed the scores until now.
        triage_images: number of images that triage.html was made for.
    """

    config: ScoringConfig | None = None
    started: str = ""
    versions: dict[str, str] | None = None
    models: dict[str, str] | None = None
    store: str | None = None
    attempt: int = -1
    arithmetic: Arithmetic | None = None
    triage_images: int = 0
    result: RunResult | None = None
    ended: str = ""


class RunState:
    """The state of one run. run.json is read once, at first use: only the process that holds the lease changes it.

    Args:
        folder: URI of the run's state folder.
        fence: of the process that writes; None: it takes no lease.

    Raises:
        OtherRunError: at first use, if run.json was not written by this class.
        RunDamagedError: at first use, if a value in it is of another type.
    """

    def __init__(self, folder: str, fence: Fence | None = None) -> None:
        self._fence = fence
        self.uri = storage.join(folder, "run.json")
        self._success_uri = storage.join(folder, "_SUCCESS")

    def exists(self) -> bool:
        """Return whether there is a run.json, even of a run whose files are being removed."""
        return storage.exists(self.uri)

    @cached_property
    def record(self) -> RunRecord:
        """The content of run.json; that of no run if there is none."""
        try:
            values = parse_json(storage.read(self.uri))
        except FileNotFoundError:
            return RunRecord()
        except (ValueError, IsADirectoryError) as error:
            raise OtherRunError(f"{self.uri} is not the record of a run ({error})") from error
        if not isinstance(values, dict) or "config" not in values:
            raise OtherRunError(f"{self.uri} is not the record of a run")
        try:
            record: RunRecord = convert(RunRecord, values, "run")
        except ValueError as error:
            raise RunDamagedError(f"{self.uri} is damaged: {error}") from error
        return record

    def config_differences(self, config: ScoringConfig) -> list[str]:
        """List how the run differs from a configuration; one line if there is no run to resume."""
        if not (before := self.record.config):
            return [f"{self.uri} is missing"]
        return _differences(*(asdict(each) | asdict(each.output) | {"output": ""} for each in (before, config)))

    def model_differences(self, models: Mapping[str, str]) -> list[str]:
        """List how the model ids of the run differ from others, by category; none if no models are bound yet."""
        bound = self.record.models
        return [] if bound is None else _differences(bound, models)

    def store_and_model_ids(self) -> tuple[str, dict[str, str]]:
        """Return the URI of the model store, and the model id of each category.

        Raises:
            DataError: if no models are bound yet.
        """
        record = self.record
        if record.models is None or record.store is None:
            raise DataError(f"{self.uri}: no record of a scored run; run the score job first")
        return record.store, record.models

    def is_finished(self) -> bool:
        """Return whether all rows are written."""
        return bool(self.record.result) and storage.exists(self._success_uri)

    def result(self) -> RunResult:
        """Return the result of a finished run.

        Raises:
            DataError: if the run is not finished.
        """
        if not self.record.result:
            raise DataError(f"{self.uri}: no record of a finished run; run the score job first")
        return self.record.result

    def next_attempt(self) -> int:
        """Number this process's attempt as its lease, or higher if that is used, as where leases were removed."""
        return max(self._fence.number if self._fence else 0, self.record.attempt + 1)

    def start(self, config: ScoringConfig) -> None:
        """Record the start of a run."""
        self.write(RunRecord(config, timestamp(), installed_versions(), attempt=self.record.attempt))

    def bind_models(self, models: Mapping[str, str], store: str) -> None:
        """Record the model id of each category, and the URI of their store."""
        bound = replace(self.record, models=dict(models), store=store)
        if bound != self.record:
            self.write(bound)

    def finish(self, result: RunResult) -> None:
        """Record the result of the finished run, and write `_SUCCESS` last."""
        self.write(replace(self.record, result=result, ended=timestamp()))
        # Other processes wrote the rows and heatmaps: they must not be lost if `_SUCCESS` survives a power failure.
        storage.sync(self.uri)
        check(self._fence)
        storage.publish(self._success_uri, b"")

    def write(self, record: RunRecord) -> None:
        """Replace the content of run.json, for instance by `replace(state.record, attempt=2)`."""
        check(self._fence)
        storage.publish(self.uri, to_json(record))
        self.record = record

    def clear(self) -> None:
        """Forget the run, but keep a mark that a run wrote the remaining files: they may be removed.

        Replace run.json first: without it nothing can be resumed. Remove `_SUCCESS` next, before any row.
        """
        if self.exists():
            attempt = -1
            # Tasks of earlier attempts may still write: later attempts have higher numbers.
            with suppress(OtherRunError, RunDamagedError):
                attempt = self.record.attempt
            self.write(RunRecord(attempt=attempt))
        storage.remove(self._success_uri)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names]
