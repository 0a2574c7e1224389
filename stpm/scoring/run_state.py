"""The state of a run, from which another run can resume it: run.json, and `_SUCCESS` once it is finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from stpm import storage
from stpm.errors import DataError, OtherRunError, RunDamagedError
from stpm.lease import Fence, check
from stpm.models.record import installed_versions
from stpm.records import convert, parse_json
from stpm.scoring.options import OutputOptions, PartitionBy
from stpm.scoring.run_statistics import RunResult
from stpm.times import timestamp

_RUN = "run.json"
_SUCCESS = "_SUCCESS"
# Types of the values that are read back.
_TYPES = {
    "config": dict[str, Any],
    "versions": dict[str, str],
    "models": dict[str, str],
    "store": str,
    "result": RunResult,
    "triage_images": int,
    "attempt": int,
}
_SCORING_LIBRARIES = ("torch", "openvino")
# The content of run.json while the run's files are being removed.
_CLEARED: dict[str, Any] = {"cleared": True}


@dataclass(frozen=True)
class ScoringConfig:
    """All that decides a run's rows, except the models.

    Args:
        images: the sources.
        false_alarm_rate: for the thresholds.
        output: what is written for each image.
        category: of every image, or "".
        category_from: pattern of the images' paths, or "".
        allow: prefixes that the URIs in a table may have.
        manifest: digest of the images, if they do not come from sources.
        standard_input: number of lines and digest, if a list of images was read there.
    """

    images: tuple[str, ...]
    false_alarm_rate: float
    output: OutputOptions = field(default_factory=OutputOptions)
    category: str = ""
    category_from: str = ""
    allow: tuple[str, ...] = ()
    manifest: str = ""
    standard_input: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the values as they are read back from JSON: flat, with lists instead of tuples."""
        values = asdict(self)
        output = values.pop("output")
        flat: dict[str, Any] = json.loads(json.dumps(values | output))
        return flat


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
        self.uri = storage.join(folder, _RUN)
        self._success_uri = storage.join(folder, _SUCCESS)

    def exists(self) -> bool:
        """Return whether there is a run.json, even of a run whose files are being removed."""
        return storage.exists(self.uri)

    def config_differences(self, config: ScoringConfig) -> list[str]:
        """List how the run differs from a configuration; one line if there is no run to resume."""
        if "config" not in self._values:
            return [f"{self.uri} is missing"]
        return _differences(self._values["config"], config.to_json())

    def false_alarm_rate(self) -> float | None:
        """Return the rate that the run requested; None if there is no run to resume."""
        rate: float | None = self._values.get("config", {}).get("false_alarm_rate")
        self._check(float | None, rate, "config.false_alarm_rate")
        return rate

    def model_differences(self, models: Mapping[str, str]) -> list[str]:
        """List how the model ids of the run differ from others, by category; none if no models are bound yet."""
        return _differences(self._values.get("models", models), models)

    def partition_by(self) -> PartitionBy | None:
        """Return how the run's rows are partitioned; None if there is no run to resume."""
        value: PartitionBy | None = self._values.get("config", {}).get("partition_by")
        if value is not None:
            self._check(PartitionBy, value, "config.partition_by")
        return value

    def version_differences(self) -> list[str]:
        """List how the libraries that compute scores differ from those that the run was started with."""
        now = installed_versions()
        before = self._values.get("versions", now)
        return _differences(*({name: found.get(name) for name in _SCORING_LIBRARIES} for found in (before, now)))

    def model_ids(self) -> dict[str, str] | None:
        """Return the model id of each category that has one; None if no models are bound yet."""
        return self._values.get("models")

    def store_and_model_ids(self) -> tuple[str, dict[str, str]]:
        """Return the URI of the model store, and the model id of each category.

        Raises:
            DataError: if no models are bound yet.
        """
        if not {"models", "store"} <= self._values.keys():
            raise DataError(f"{self.uri}: no record of a scored run; run the score job first")
        return self._values["store"], self._values["models"]

    def is_finished(self) -> bool:
        """Return whether all rows are written."""
        return "result" in self._values and storage.exists(self._success_uri)

    def result(self) -> RunResult:
        """Return the result of a finished run.

        Raises:
            DataError: if the run is not finished.
        """
        if "result" not in self._values:
            raise DataError(f"{self.uri}: no record of a finished run; run the score job first")
        result: RunResult = self._check(RunResult, self._values["result"], "result")
        return result

    def attempt(self) -> int:
        """Return the number of the attempt whose checkpoints count; -1 if no row was to be written yet."""
        number: int = self._values.get("attempt", -1)
        return number

    def next_attempt(self) -> int:
        """Number this process's attempt as its lease, or higher if that is used, as where leases were removed."""
        return max(self._fence.number if self._fence else 0, self.attempt() + 1)

    def record_attempt(self, number: int) -> None:
        """Record that from now on only the checkpoints of this attempt count."""
        self._write(self._values | {"attempt": number})

    def triage_images(self) -> int:
        """Return the number of images that triage.html was made for; 0 if it was not made."""
        images: int = self._values.get("triage_images", 0)
        return images

    def start(self, config: ScoringConfig) -> None:
        """Record the start of a run."""
        self._write({"config": config.to_json(), "started": timestamp(), "versions": installed_versions()})

    def bind_models(self, models: Mapping[str, str], store: str) -> None:
        """Record the model id of each category, and the URI of their store, which may change between runs."""
        bound = {"models": dict(models), "store": store}
        if not bound.items() <= self._values.items():
            self._write(self._values | bound)

    def record_triage(self, images: int) -> None:
        """Record that triage.html was made for a number of images."""
        self._write(self._values | {"triage_images": images})

    def update_result(self, result: RunResult) -> None:
        """Record another result of the finished run."""
        self._write(self._values | {"result": asdict(result)})

    def finish(self, result: RunResult) -> None:
        """Record the result of the finished run, and write `_SUCCESS` last."""
        self._write(self._values | {"result": asdict(result), "ended": timestamp()})
        # Other processes wrote the rows and heatmaps: they must not be lost if `_SUCCESS` survives a power failure.
        storage.sync(self.uri)
        check(self._fence)
        storage.publish(self._success_uri, b"")

    def clear(self) -> None:
        """Forget the run, but keep a mark that a run wrote the remaining files: they may be removed.

        Replace run.json first: without it nothing can be resumed. Remove `_SUCCESS` next, before any row.
        """
        if self.exists():
            self._write(_CLEARED)
        storage.remove(self._success_uri)

    def is_cleared(self) -> bool:
        """Return whether the removal of the run's files was cut off."""
        return self._values == _CLEARED

    def forget(self) -> None:
        """Remove run.json, after all other files of the run."""
        storage.remove(self.uri)

    @cached_property
    def _values(self) -> dict[str, Any]:
        """The content of run.json; empty if there is none."""
        try:
            values = parse_json(storage.read(self.uri))
        except FileNotFoundError:
            return {}
        except (ValueError, IsADirectoryError) as error:
            raise OtherRunError(f"{self.uri} is not the record of a run ({error})") from error
        if not isinstance(values, dict) or not ("config" in values or values == _CLEARED):
            raise OtherRunError(f"{self.uri} is not the record of a run")
        try:
            _encode(values)
        except (UnicodeEncodeError, RecursionError) as error:
            raise RunDamagedError(f"{self.uri} is damaged: no run writes such values ({error})") from error
        for name in _TYPES.keys() & values.keys():
            self._check(_TYPES[name], values[name], name)
        return values

    def _check(self, kind: Any, value: Any, name: str) -> Any:
        """Convert a value of run.json. Raise RunDamagedError if it is of another type."""
        try:
            return convert(kind, value, name)
        except ValueError as error:
            raise RunDamagedError(f"{self.uri} is damaged: {error}") from error

    def _write(self, values: dict[str, Any]) -> None:
        check(self._fence)
        storage.publish(self.uri, _encode(values))
        self._values = values


def _encode(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=2, ensure_ascii=False).encode()


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names]
