"""The model store: one folder per category, published whole, verified when loaded; no pickle anywhere.

<store>/teachers/<digest>.safetensors                once per store
<store>/<category>/current.json                      the id of the category's model; written last of all
<store>/<category>/<model id>/student.safetensors    where the recipe has a student
<store>/<category>/<model id>/memory.safetensors     where it has a memory
<store>/<category>/<model id>/calibration.parquet    `score`: float32, ascending
<store>/<category>/<model id>/history.parquet        one row per epoch, where there is a student
<store>/<category>/<model id>/loss.png               the same as a picture
<store>/<category>/<model id>/model.json             written last; a folder without it is not a model

A model is never changed, and a new one never removes an older one: what began with a model ends with it.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stpm import storage
from stpm.errors import DataError, ModelError, ModelUnreadableError, NoModelError
from stpm.method.calibration import Calibration, PartScale
from stpm.method.preprocessing import Preprocessing
from stpm.method.recipe import Precision, Recipe
from stpm.models.record import CALIBRATION, MEMORY, STUDENT, FitSummary, ModelRecord, library_versions

# Where weights are read or written these are imported: whoever needs records alone does without torch.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stpm.method.backbones import Backbone, StateDict
    from stpm.method.forward import Parts
    from stpm.method.memory_bank import MemoryBank

_TEACHERS = "teachers"
_CURRENT = "current.json"
_RECORD = "model.json"
_HISTORY = "history.parquet"
_PICTURE = "loss.png"
_CHECKPOINT = "checkpoint-{}.safetensors"
_OF_BANK = ("mean", "whitening", "vectors")


@dataclass(frozen=True)
class Current:
    """current.json: which model a category has now, and the images that it was last fitted on."""

    model_id: str
    data_fingerprint: str


@dataclass(frozen=True)
class Model:
    """A model ready for scoring."""

    record: ModelRecord
    parts: Parts
    calibration: Calibration

    def to(self, device: torch.device) -> Model:
        return dataclasses.replace(self, parts=self.parts.to(device))


class ModelStore:
    """Models under a URI. Safe to read while others publish."""

    def __init__(self, uri: str) -> None:
        self.uri = storage.absolute(uri)

    def put_teacher(self, state: StateDict) -> str:
        """Store a teacher's weights once; returns their digest."""
        from stpm.method.backbones import serialise

        data = serialise(state)
        digest = storage.digest(data)
        uri = self._teacher_uri(digest)
        try:
            self._read_verified(uri, digest)
        except ModelError:
            # Missing, or damaged: every model of the store needs it.
            storage.publish(uri, data)
        return digest

    def load_teacher(self, teacher: str, levels: tuple[int, ...], digest: str) -> Backbone:
        """A frozen teacher, from the store alone.

        Args:
            teacher: its name in the recipe.
            levels: its pyramid levels.
            digest: of its weights.

        Raises:
            ModelError: if it is missing, damaged or not of that architecture.
        """
        from stpm.method.backbones import architecture_of, load_backbone, deserialise

        uri = self._teacher_uri(digest)
        state = deserialise(self._read_verified(uri, digest), uri)
        return load_backbone(architecture_of(teacher), levels, state, uri)

    def save(
        self,
        *,
        category: str,
        recipe: Recipe,
        preprocessing: Preprocessing,
        precision: Precision,
        teacher_digest: str,
        data_fingerprint: str,
        student: StateDict | None,
        memory: Sequence[MemoryBank],
        calibration: Calibration,
        part_scales: tuple[PartScale, ...],
        history: pa.Table,
        picture: bytes,
        fit: FitSummary,
    ) -> ModelRecord:
        """Publish a model and make it its category's; returns the record that is stored.

        A fit that came to a model that is there already changes nothing in it, unless it is damaged.
        """
        from stpm.method.backbones import serialise

        contents = {CALIBRATION: storage.parquet(pa.table({"score": calibration.scores}))}
        if student is not None:
            contents |= {STUDENT: serialise(student), _HISTORY: storage.parquet(history), _PICTURE: picture}
        if memory:
            contents[MEMORY] = serialise(_named(memory))
        record = ModelRecord(
            category=storage.safe_name(category, "category"),
            recipe=recipe,
            preprocessing=preprocessing,
            precision=precision,
            teacher_digest=teacher_digest,
            heatmap_scale=calibration.scale,
            part_scales=part_scales,
            fit=fit,
            files={name: storage.digest(data) for name, data in contents.items()},
            versions=library_versions(),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        try:
            stored = self.record(category, record.model_id)
            self.verify(stored)
            record = stored
        except ModelError:
            self._publish(record, contents)
        current = Current(record.model_id, data_fingerprint)
        storage.publish(self._current_uri(category), json.dumps(dataclasses.asdict(current), indent=2).encode())
        return record

    def _publish(self, record: ModelRecord, contents: Mapping[str, bytes]) -> None:
        # Readers go by model.json: without it there is no model. Where it is damaged, what scores is made whole again
        # by the same bytes, since its id is made of them.
        for name, data in contents.items():
            storage.publish(self._uri(record, name), data)
        storage.publish(self._uri(record, _RECORD), json.dumps(dataclasses.asdict(record), indent=2).encode())

    def categories(self) -> list[str]:
        """Names of the categories that have a model, sorted.

        Raises:
            ModelError: if the store is missing or holds no model.
        """
        try:
            folders = storage.children(self.uri)
        except DataError:
            folders = []
        found = [name for name in folders if storage.exists(storage.join(self.uri, name, _CURRENT))]
        if not found:
            raise ModelError(f"{self.uri}: no models here; fit some with jobs/fit.py --models {self.uri}")
        return found

    def current(self, category: str) -> Current:
        """Which model a category has.

        Raises:
            ModelError: if it has none.
        """
        uri = self._current_uri(category)
        try:
            return Current(**json.loads(_read(uri)))
        except FileNotFoundError as error:
            raise NoModelError(f"{self.uri}: no model for category {category!r}") from error
        except (TypeError, ValueError) as error:
            raise ModelError(f"{uri}: cannot be read: {error}") from error

    def record(self, category: str, model_id: str = "") -> ModelRecord:
        """A model's record.

        Args:
            category: its category.
            model_id: which of the category's models; none: its current one.

        Raises:
            ModelError: if there is no such model, or the record is foreign or of another format.
        """
        model_id = model_id or self.current(category).model_id
        uri = storage.join(self.folder(category), model_id, _RECORD)
        try:
            record = ModelRecord.from_json(_read(uri), uri)
        except FileNotFoundError as error:
            raise ModelError(f"{self.uri}: no model {model_id} for category {category!r}") from error
        if record.model_id != model_id:
            raise ModelError(f"{uri}: this is {record.model_id}; fit the model again")
        return record

    def verify(self, record: ModelRecord) -> None:
        """Read every file of a model.

        Raises:
            ModelError: if one is missing or damaged.
        """
        for name, digest in record.files.items():
            self._read_verified(self._uri(record, name), digest)

    def load(self, category: str, model_id: str = "") -> Model:
        """A model, each file verified by its digest.

        Args:
            category: its category.
            model_id: which of the category's models; none: its current one.

        Raises:
            ModelError: if a file is missing, damaged or foreign.
        """
        from stpm.method.backbones import architecture_of, load_backbone
        from stpm.method.forward import Parts

        record = self.record(category, model_id)
        scores = self._table(record, CALIBRATION).column("score").to_numpy().astype(np.float32)
        student = None
        if STUDENT in record.files:
            state = self._tensors(record, STUDENT)
            architecture = architecture_of(record.recipe.teacher)
            student = load_backbone(architecture, record.recipe.levels, state, self._uri(record, STUDENT))
        memory = _unnamed(self._tensors(record, MEMORY)) if MEMORY in record.files else ()
        return Model(record, Parts(student, memory), Calibration(scores, record.heatmap_scale))

    def folder(self, category: str) -> str:
        """The folder of a category."""
        return storage.join(self.uri, storage.safe_name(category, "category"))

    def checkpoint_uri(self, category: str, number: int = 0) -> str:
        """Where a fit of this category keeps its progress while it runs; a task of several fits numbers them."""
        return storage.join(self.folder(category), _CHECKPOINT.format(number))

    def history(self, record: ModelRecord) -> pa.Table:
        """Loss per epoch: columns of `stpm.fitting.task.Epoch`; none if there is no student."""
        return self._table(record, _HISTORY) if _HISTORY in record.files else pa.table({})

    def _tensors(self, record: ModelRecord, name: str) -> StateDict:
        from stpm.method.backbones import deserialise

        uri = self._uri(record, name)
        return deserialise(self._read_verified(uri, record.files[name]), uri)

    def _table(self, record: ModelRecord, name: str) -> pa.Table:
        data = self._read_verified(self._uri(record, name), record.files[name])
        return pq.read_table(io.BytesIO(data))

    def _uri(self, record: ModelRecord, name: str) -> str:
        return storage.join(self.folder(record.category), record.model_id, name)

    def _current_uri(self, category: str) -> str:
        return storage.join(self.folder(category), _CURRENT)

    def _teacher_uri(self, digest: str) -> str:
        return storage.join(self.uri, _TEACHERS, f"{digest}.safetensors")

    @staticmethod
    def _read_verified(uri: str, digest: str) -> bytes:
        try:
            data = _read(uri)
        except FileNotFoundError as error:
            raise ModelError(f"{uri}: cannot be read: {error}") from error
        if storage.digest(data) != digest:
            raise ModelError(f"{uri}: its SHA-256 is {storage.digest(data)}, {digest} expected; fit the model again")
        return data


def _read(uri: str) -> bytes:
    try:
        return storage.read(uri)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ModelUnreadableError(f"{uri}: cannot be read: {error}") from error


def _named(memory: Sequence[MemoryBank]) -> dict[str, Tensor]:
    """Tensors by name: that of a bank begins with its level, kind and window. Vectors lose nothing as halves."""
    return {
        f"{bank.level}.{bank.kind}.{bank.window}.{name}": tensor
        for bank in memory
        for name, tensor in (("mean", bank.mean), ("whitening", bank.whitening), ("vectors", bank.vectors.half()))
    }


def _unnamed(tensors: StateDict) -> tuple[MemoryBank, ...]:
    """The banks that `_named` took apart, by level and then by kind, as they were made."""
    from stpm.method.memory_bank import KINDS, MemoryBank

    windows = {(int(level), kind): window for level, kind, window, _ in (name.split(".") for name in tensors)}
    return tuple(
        MemoryBank(
            level,
            kind,
            int(windows[level, kind]),
            *(tensors[f"{level}.{kind}.{windows[level, kind]}.{name}"].float() for name in _OF_BANK),
        )
        for level in sorted({level for level, _ in windows})
        for kind in KINDS
        if (level, kind) in windows
    )
