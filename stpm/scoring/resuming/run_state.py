"""What a pass is, what it has done, and whether another run may go on with it: run.json, and _SUCCESS at the end."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal

from stpm import storage
from stpm.errors import ConfigError, DataError
from stpm.models.record import library_versions

_RUN = "run.json"
_SUCCESS = "_SUCCESS"
# The record of a pass that is being removed.
_CLEARED: dict[str, Any] = {"cleared": True}


@dataclass(frozen=True)
class RunConfig:
    """All that decides a pass's rows, but the models.

    `manifest` is the digest of the rows where those are given, `standard_input` says what came there where it was read.
    """

    images: tuple[str, ...]
    false_alarm_rate: float
    heatmaps: str
    raw_maps: bool
    overlay: bool = False
    heatmaps_in: str = "files"
    partition_by: str = "none"
    category: str = ""
    category_from: str = ""
    allow: tuple[str, ...] = ()
    manifest: str = ""
    standard_input: str = ""


@dataclass(frozen=True)
class Counts:
    """What came of a pass: rows, those called anomalous, and errors by kind; the same by category; bytes read.

    `left` are images that no row is written of yet: storage, a model or a device failed them.
    """

    rows: int = 0
    anomalous: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    categories: dict[str, dict[str, int]] = field(default_factory=dict)
    bytes_read: int = 0
    left: int = 0

    @property
    def failed(self) -> int:
        return sum(self.errors.values())


@dataclass(frozen=True)
class Effort:
    """What one run took; an earlier one may have scored other images of the pass.

    Args:
        images: that it scored.
        seconds: from its start to its end.
        steady_images_per_second: once it was under way.
        decode_seconds: of a CPU core, for fetching and decoding.
        forward_seconds: of the scorers' devices: of a CPU core, or of a GPU.
        encode_seconds: of a CPU core, for heatmaps.
        device: of the scorers.
        cpus: of all nodes that took work.
        gpus: of the same.
    """

    images: int = 0
    seconds: float = 0.0
    steady_images_per_second: float = 0.0
    decode_seconds: float = 0.0
    forward_seconds: float = 0.0
    encode_seconds: float = 0.0
    device: Literal["cpu", "gpu"] = "cpu"
    cpus: float = 0.0
    gpus: float = 0.0

    @property
    def images_per_second(self) -> float:
        """From its start to its end."""
        return self.images / self.seconds if self.seconds else 0.0


class RunState:
    """The state of one pass, in a folder.

    Args:
        home: URI of the folder.
    """

    def __init__(self, home: str) -> None:
        self.run_uri = storage.join(home, _RUN)
        self._success_uri = storage.join(home, _SUCCESS)

    def differences(self, config: RunConfig) -> list[str]:
        """What keeps a pass from being taken up as this one: nothing, or that there is none, or what differs."""
        before = self._read() or _CLEARED
        if before == _CLEARED:
            return [f"{self.run_uri} is missing"]
        return _differences(before["config"], _as_json(config))

    def begin(self, config: RunConfig) -> None:
        """Start a pass."""
        self._write({"config": _as_json(config), "started": _now(), "versions": library_versions()})

    def bind(self, models: dict[str, str], store: str) -> list[str]:
        """Say which model of a store scores which category; returns what differs from what an earlier run said.

        The same models may lie elsewhere by now.
        """
        values = self._require()
        if differences := _differences(values.get("models", models), models):
            return differences
        if (values.get("models"), values.get("store")) != (models, store):
            self._write(values | {"models": models, "store": store})
        return []

    def models(self) -> tuple[str, dict[str, str]]:
        """URI of the store, and the model of each category.

        Raises:
            DataError: if the pass has not come so far.
        """
        values = self._read() or {}
        if "models" not in values:
            raise DataError(f"{self.run_uri}: no record of a scored pass; run the score job first")
        return values["store"], values["models"]

    def done(self) -> Counts | None:
        """The counts of a pass that has ended, or None."""
        values = self._read() or {}
        return Counts(**values["counts"]) if "counts" in values and storage.exists(self._success_uri) else None

    def finish(self, counts: Counts, effort: Effort) -> None:
        """Write the counts of the whole pass and what its last run took, and `_SUCCESS` last."""
        self._write(self._require() | {"counts": asdict(counts), "ended": _now(), "effort": asdict(effort)})
        # The rows and pictures are others' writes, and must not be lost where `_SUCCESS` is kept.
        storage.sync(self.run_uri)
        storage.publish(self._success_uri, b"")

    def effort(self) -> Effort:
        """What the run took that ended the pass.

        Raises:
            DataError: if it has not ended.
        """
        values = self._read() or {}
        if "effort" not in values:
            raise DataError(f"{self.run_uri}: no record of a pass that has ended; run the score job first")
        return Effort(**values["effort"])

    def page(self) -> int:
        """Images that were asked for on the page of the most anomalous ones; 0 before it was written."""
        return int((self._read() or {}).get("page", 0))

    def wrote_page(self, top: int) -> None:
        """Say that the page was written."""
        self._write(self._require() | {"page": top})

    def exists(self) -> bool:
        """Whether a run of ours has been here, even if all it left is being removed."""
        return storage.exists(self.run_uri)

    def clear(self) -> None:
        """Forget the pass, and keep that there was one: what is left of it is still ours to remove.

        The record goes first: without it whatever else is there counts for nothing. Then `_SUCCESS`, before any row.
        """
        if self.exists():
            self._write(_CLEARED)
        storage.remove(self._success_uri)

    def _read(self) -> dict[str, Any] | None:
        try:
            values: dict[str, Any] = json.loads(storage.read(self.run_uri))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ConfigError(
                f"{self.run_uri} is not a run's record ({error}); give another --out, or --fresh"
            ) from error
        if not isinstance(values, dict) or not ("config" in values or values == _CLEARED):
            raise ConfigError(f"{self.run_uri} is not a run's record; give another --out, or --fresh")
        return values

    def _require(self) -> dict[str, Any]:
        values = self._read()
        if values is None or values == _CLEARED:
            raise ConfigError(f"{self.run_uri} was removed while its pass ran; run again")
        return values

    def _write(self, values: dict[str, Any]) -> None:
        storage.publish(self.run_uri, json.dumps(values, indent=2, ensure_ascii=False).encode())


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names]


def _as_json(config: RunConfig) -> dict[str, Any]:
    """With lists for tuples, as it is read back."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return values


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
