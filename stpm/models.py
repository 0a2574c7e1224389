"""The model store: one folder per category, published whole, verified when loaded; no pickle anywhere.

<store>/teachers/<digest>.safetensors     once per store
<store>/<category>/student.safetensors
<store>/<category>/calibration.parquet    `score`: float32, ascending
<store>/<category>/levels.safetensors     mean and deviation of each level, where the recipe combines by them
<store>/<category>/history.parquet        one row per epoch
<store>/<category>/loss.png               the same as a picture
<store>/<category>/model.json             written last; a folder without it is not a model
"""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from stpm import storage
from stpm.calibration import Calibration, HeatmapScale
from stpm.errors import ConfigError, ModelError
from stpm.forward import place
from stpm.matching import LevelStatistics
from stpm.networks import StateDict, Trunk, architecture_of, deserialise, serialise, trunk_from
from stpm.options import Integers, Size
from stpm.preprocessing import Preprocessing
from stpm.recipe import Precision, Recipe
from stpm.record import FORMAT, STUDENT, FitSummary, ModelRecord, library_versions

_TEACHERS = "teachers"
_RECORD = "model.json"
_CALIBRATION = "calibration.parquet"
_HISTORY = "history.parquet"
_LEVELS = "levels.safetensors"
_PICTURE = "loss.png"
_CHECKPOINT = "checkpoint-{}.safetensors"


@dataclass(frozen=True)
class Model:
    """A model ready for scoring, its student in eval mode."""

    record: ModelRecord
    student: Trunk
    calibration: Calibration
    statistics: list[LevelStatistics] | None

    def to(self, device: torch.device) -> Model:
        statistics = None if self.statistics is None else [level.to(device) for level in self.statistics]
        return dataclasses.replace(self, student=place(self.student, device), statistics=statistics)


class ModelStore:
    """Models under a URI. Safe to read while others publish."""

    def __init__(self, uri: str) -> None:
        self.uri = storage.absolute(uri)

    def put_teacher(self, state: StateDict) -> str:
        """Store a teacher's weights once; returns their digest."""
        data = serialise(state)
        digest = storage.digest(data)
        uri = self._teacher_uri(digest)
        if not storage.exists(uri):
            storage.publish(uri, data)
        return digest

    def load_teacher(self, teacher: str, levels: tuple[int, ...], digest: str) -> Trunk:
        """A frozen teacher, from the store alone.

        Args:
            teacher: its name in the recipe.
            levels: its pyramid levels.
            digest: of its weights.

        Raises:
            ModelError: if it is missing, damaged or not of that architecture.
        """
        uri = self._teacher_uri(digest)
        state = deserialise(self._read_verified(uri, digest), uri)
        return trunk_from(architecture_of(teacher), levels, state, uri)

    def save(
        self,
        *,
        category: str,
        recipe: Recipe,
        preprocessing: Preprocessing,
        precision: Precision,
        teacher_digest: str,
        data_fingerprint: str,
        student: StateDict,
        calibration: Calibration,
        statistics: list[LevelStatistics] | None,
        history: pa.Table,
        picture: bytes,
        fit: FitSummary,
    ) -> ModelRecord:
        """Publish a model in the place of an older one of the same category, if there is one."""
        contents = {
            STUDENT: serialise(student),
            _CALIBRATION: storage.parquet(pa.table({"score": calibration.scores})),
            _HISTORY: storage.parquet(history),
            _PICTURE: picture,
        }
        if statistics is not None:
            contents[_LEVELS] = serialise(_named(statistics))
        record = ModelRecord(
            category=storage.safe_name(category, "category"),
            recipe=recipe,
            preprocessing=preprocessing,
            precision=precision,
            teacher_digest=teacher_digest,
            data_fingerprint=data_fingerprint,
            heatmap_scale=calibration.scale,
            fit=fit,
            files={name: storage.digest(data) for name, data in contents.items()},
            versions=library_versions(),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        # Readers go by model.json: without it there is no model, and its digests tie the four files together.
        storage.remove(self._uri(category, _RECORD))
        for name, data in contents.items():
            storage.publish(self._uri(category, name), data)
        storage.publish(self._uri(category, _RECORD), json.dumps(dataclasses.asdict(record), indent=2).encode())
        return record

    def categories(self) -> list[str]:
        """Names of the categories that have a model, sorted.

        Raises:
            ModelError: if the store is missing or holds no model.
        """
        fs, path = storage.filesystem(self.uri)
        found = sorted(p.rstrip("/").split("/")[-2] for p in fs.glob(f"{fs._strip_protocol(path)}/*/{_RECORD}"))
        if not found:
            raise ModelError(f"{self.uri}: no models here; fit some with jobs/fit.py --models {self.uri}")
        return found

    def record(self, category: str) -> ModelRecord:
        """A model's record.

        Raises:
            ModelError: if there is no such model, or the record is foreign or of another format.
        """
        uri = self._uri(category, _RECORD)
        try:
            return _record_from(json.loads(storage.read(uri)), uri)
        except FileNotFoundError as error:
            raise ModelError(f"{self.uri}: no model for category {category!r}") from error
        except (ValueError, OSError) as error:
            raise ModelError(f"{uri}: cannot be read: {error}") from error

    def load(self, category: str) -> Model:
        """A model, each file verified by its digest.

        Raises:
            ModelError: if a file is missing, damaged or foreign.
        """
        record = self.record(category)
        uri = self._uri(category, STUDENT)
        state = deserialise(self._read_verified(uri, record.files[STUDENT]), uri)
        scores = self._table(record, _CALIBRATION).column("score").to_numpy().astype(np.float32)
        statistics = None
        if _LEVELS in record.files:
            levels = self._uri(category, _LEVELS)
            statistics = _unnamed(deserialise(self._read_verified(levels, record.files[_LEVELS]), levels))
        return Model(
            record=record,
            student=trunk_from(architecture_of(record.recipe.teacher), record.recipe.levels, state, uri),
            calibration=Calibration(scores, record.heatmap_scale),
            statistics=statistics,
        )

    def folder(self, category: str) -> str:
        """The folder of a category."""
        return storage.join(self.uri, storage.safe_name(category, "category"))

    def checkpoint_uri(self, category: str, number: int = 0) -> str:
        """Where a fit of this category keeps its progress while it runs; a task of several fits numbers them."""
        return self._uri(category, _CHECKPOINT.format(number))

    def history(self, record: ModelRecord) -> pa.Table:
        """Loss per epoch: columns of `stpm.fitting.loop.Epoch`."""
        return self._table(record, _HISTORY)

    def _table(self, record: ModelRecord, name: str) -> pa.Table:
        data = self._read_verified(self._uri(record.category, name), record.files[name])
        return pq.read_table(io.BytesIO(data))

    def _uri(self, category: str, name: str) -> str:
        return storage.join(self.folder(category), name)

    def _teacher_uri(self, digest: str) -> str:
        return storage.join(self.uri, _TEACHERS, f"{digest}.safetensors")

    @staticmethod
    def _read_verified(uri: str, digest: str) -> bytes:
        try:
            data = storage.read(uri)
        except OSError as error:
            raise ModelError(f"{uri}: cannot be read: {error}") from error
        if storage.digest(data) != digest:
            raise ModelError(f"{uri}: its SHA-256 is {storage.digest(data)}, {digest} expected; fit the model again")
        return data


def _named(statistics: list[LevelStatistics]) -> dict[str, Tensor]:
    return {
        f"{name}.{level}": tensor
        for level, of in enumerate(statistics)
        for name, tensor in (("mean", of.mean), ("deviation", of.deviation))
    }


def _unnamed(tensors: StateDict) -> list[LevelStatistics]:
    return [LevelStatistics(tensors[f"mean.{i}"], tensors[f"deviation.{i}"]) for i in range(len(tensors) // 2)]


def _record_from(values: Any, uri: str) -> ModelRecord:
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise ModelError(f"{uri}: format {found!r}, this version reads {FORMAT}; fit the model again")
    try:
        recipe = values["recipe"]
        recipe |= {"levels": Integers(recipe["levels"]), "size": Size(recipe["size"])}
        preprocessing = values["preprocessing"]
        preprocessing |= {name: tuple(preprocessing[name]) for name in ("mean", "std")}
        return ModelRecord(
            **values
            | {
                "recipe": Recipe(**recipe),
                "preprocessing": Preprocessing(**preprocessing),
                "heatmap_scale": HeatmapScale(**values["heatmap_scale"]),
                "fit": FitSummary(**values["fit"]),
            }
        )
    except (TypeError, KeyError, ValueError, ConfigError) as error:
        raise ModelError(f"{uri}: not a record of this version: {error}; fit the model again") from error
