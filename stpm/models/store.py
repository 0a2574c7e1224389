"""The model store: one folder per category, whose files are verified when they are loaded; none is a pickle.

<store>/teachers/<digest>.safetensors                one for all models with this teacher
<store>/<category>/current.json                      the ids of the category's current model, of those before it and
                                                     of those after it; written last of all
<store>/<category>/<model id>/student.safetensors    if the recipe has a student
<store>/<category>/<model id>/memory.safetensors     if the recipe has a memory
<store>/<category>/<model id>/calibration.parquet    columns `score`: float32, ascending;
                                                     `max_pixel`: float32, largest of the image's anomaly map;
                                                     `is_added`: of an image that was marked as good
<store>/<category>/<model id>/image_statistics.parquet  a row per good image: stpm.data.image_statistics.COMPARED
<store>/<category>/<model id>/fit.html               the good images, those unlike all others first
<store>/<category>/<model id>/history.parquet        one row per epoch, if there is a student
<store>/<category>/<model id>/model.json             written last; a folder without it is not a model
<store>/<category>/checkpoint.safetensors            of an unfinished fit
<store>/.lease/                                      see stpm/lease.py
<store>/.train/                                      Ray Train's files during a fit

A model never changes, and a new model never removes an older one: a run keeps to the model that it began with, and the
current model can be rolled back.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import pyarrow as pa

from stpm import storage
from stpm.errors import DataError, ModelDamagedError, ModelError, ModelUnreadableError, NoModelError
from stpm.method.calibration import Calibration
from stpm.models.record import CALIBRATION, IMAGE_STATISTICS, MEMORY, STUDENT, ModelRecord, StoredFile
from stpm.models.versions import Version, Versions
from stpm.names import other_form, safe_name, unicode_forms
from stpm.records import from_json, to_json

# Methods that read or write weights import these themselves: processes that need records alone do not import torch.
if TYPE_CHECKING:
    from stpm.method.backbones import Backbone, StateDict
    from stpm.method.memory_bank import MemoryBank

T = TypeVar("T")

_TEACHERS = "teachers"
_CURRENT = "current.json"
_RECORD = "model.json"
_HISTORY = "history.parquet"
_CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Model:
    """A stored model, on the CPU: the weights of its student, if it has one, its memory banks, and its calibration."""

    record: ModelRecord
    student: StateDict | None
    memory: tuple[MemoryBank, ...]
    calibration: Calibration


def encode_model(
    student: StateDict | None,
    memory: Sequence[MemoryBank],
    calibration: pa.Table,
    image_statistics: pa.Table,
    history: pa.Table,
) -> dict[str, bytes]:
    """Encode the files of a model, by name; all but its record.

    Args:
        student: weights, if there is a student.
        memory: empty if there is none.
        calibration: a row for each calibration image, in the columns of `ModelStore.calibration_scores`, in any order.
        image_statistics: a row for each good image that the model was fitted on or calibrated with, in the columns of
            `stpm.data.image_statistics.COMPARED`.
        history: losses per epoch, stored with a student.
    """
    from stpm.method.backbones import serialise
    from stpm.method.memory_bank import banks_to_tensors

    files = {
        CALIBRATION: storage.encode_parquet(calibration.sort_by("score")),
        IMAGE_STATISTICS: storage.encode_parquet(image_statistics),
    }
    if student is not None:
        files |= {STUDENT: serialise(student), _HISTORY: storage.encode_parquet(history)}
    if memory:
        files[MEMORY] = serialise(banks_to_tensors(memory))
    return files


def describe_files(files: Mapping[str, bytes]) -> dict[str, StoredFile]:
    """Return digest and size of each file, by name."""
    return {name: StoredFile(storage.digest(data), len(data)) for name, data in files.items()}


class ModelStore:
    """Models under a URI. Reading is safe while other processes publish."""

    def __init__(self, uri: str) -> None:
        self.uri = storage.absolute(uri)

    def put_teacher(self, state: StateDict) -> str:
        """Store a teacher's weights, unless they are there, and return their digest."""
        from stpm.method.backbones import serialise

        data = serialise(state)
        digest = storage.digest(data)
        self._keep_teacher(digest, lambda: data)
        return digest

    def _keep_teacher(self, digest: str, read: Callable[[], bytes]) -> None:
        uri = self._teacher_uri(digest)
        try:
            _read_verified(uri, digest)
        except ModelError:
            # Missing or damaged.
            storage.publish(uri, read())

    def load_teacher(self, teacher: str, levels: tuple[int, ...], digest: str) -> Backbone:
        """Load a frozen teacher by its name in the recipe and the digest of its weights, without a network.

        Raises:
            ModelError: if it is missing, damaged or of another architecture.
        """
        from stpm.method.backbones import deserialise, load_backbone

        uri = self._teacher_uri(digest)
        state = deserialise(_read_verified(uri, digest), uri)
        return load_backbone(teacher, levels, state, uri)

    def save(self, record: ModelRecord, files: Mapping[str, bytes], data_fingerprint: str) -> ModelRecord:
        """Publish a model, make it its category's current one, and return its stored record.

        Keep the files of the same model if the store has it, undamaged. `files` are those of `encode_model`, and
        `data_fingerprint` is a digest of the images that the model was fitted on.

        Raises:
            DataError: if the category's name is not allowed in a path.
        """
        safe_name(record.category, "category")
        record = dataclasses.replace(record, files=describe_files(files))
        try:
            stored = self.record(record.category, record.model_id)
            self.read_files(stored)
            record = stored
        except ModelError:
            # The id is a digest of the files: this also repairs a damaged model. model.json comes last.
            uris = {self._uri(record, name): data for name, data in files.items()}
            storage.in_parallel(lambda uri: storage.publish(uri, uris[uri]), uris)
            storage.publish(self._uri(record, _RECORD), to_json(record))
        version = Version(record.model_id, data_fingerprint)
        try:
            versions = self.versions(record.category).publish(version)
        except ModelDamagedError:
            # There is no current.json, or a damaged one.
            versions = Versions(version)
        self.set_versions(record.category, versions)
        return record

    def copy_model(self, source: ModelStore, record: ModelRecord, category: str) -> ModelRecord:
        """Publish another store's model and its teacher here, and make it the current model of `category`.

        Raises:
            DataError: if the category's name is not allowed in a path.
            ModelError: if a file of the model is missing or damaged.
        """
        digest = record.teacher_digest
        self._keep_teacher(digest, lambda: _read_verified(source._teacher_uri(digest), digest))
        files = source.read_files(record)
        fingerprints = {each.model_id: each.data_fingerprint for each in source.versions(record.category).every}
        copied = dataclasses.replace(record, category=category)
        return self.save(copied, files, fingerprints.get(record.model_id, ""))

    def versions(self, category: str) -> Versions:
        """Read the current model of a category, those before it, and those after it.

        Raises:
            NoModelError: if it has none.
            ModelDamagedError: if current.json is damaged.
            ModelUnreadableError: if storage failed.
        """
        uri = self._current_uri(category)
        try:
            return _read_record(Versions, uri)
        except FileNotFoundError as error:
            # Ask for these alone: a listing of all categories, for each that is missing, takes far more requests.
            other = other_form(category, filter(self._has_models, unicode_forms(category)))
            raise NoModelError(
                f"{self.uri}: no model for category {category!r}; "
                f"{other or f'fit it first (stpm fit --data DATA --models {shlex.quote(self.uri)})'}"
            ) from error

    def set_versions(self, category: str, versions: Versions) -> None:
        """Write the current model of a category, those before it, and those after it."""
        storage.publish(self._current_uri(category), to_json(versions))

    def current(self, category: str) -> Version:
        """Read the current model of a category. Raise as `versions` does."""
        return self.versions(category).current

    def categories(self) -> list[str]:
        """List the categories that have a model, sorted.

        Raises:
            DataError: if there is no such store.
        """
        return [name for name in storage.subfolders(self.uri, links=True) if self._has_models(name)]

    def _has_models(self, folder: str) -> bool:
        try:
            return storage.exists(self._current_uri(folder))
        except DataError:
            # No category has such a name.
            return False

    def model_ids(self, category: str) -> list[str]:
        """List all models of a category, sorted, even those that rolling back or forward no longer reaches."""
        names = [uri.split("/")[-2:] for uri in storage.files(self.folder(category))]
        return sorted(folder for folder, name in names if name == _RECORD)

    def model_folders(self, category: str) -> list[str]:
        """List the folders of all models of a category, even those without a record, which a kill leaves."""
        folders = {uri.split("/")[-2] for uri in storage.files(self.folder(category))}
        return sorted(folder for folder in folders if folder.startswith(f"{category}-"))

    def remove(self, category: str, model_id: str) -> None:
        """Remove the files of a model, the record first: without it the folder is not a model."""
        folder = storage.join(self.folder(category), model_id)
        storage.remove(storage.join(folder, _RECORD))
        storage.remove(folder)

    def roll_command(self, category: str, flag: Literal["--roll-back", "--roll-forward"]) -> str:
        """Return the command line that makes the category's previous or next model current."""
        return f"{self._list_command()} --categories {shlex.quote(category)} {flag}"

    def _list_command(self) -> str:
        return f"stpm models --models {shlex.quote(self.uri)}"

    def calibration_scores(self, record: ModelRecord) -> pa.Table:
        """Read what calibrates a model, by ascending score, in the columns `score`, `max_pixel` and `is_added`."""
        return self._table(record, CALIBRATION)

    def record(self, category: str, model_id: str = "") -> ModelRecord:
        """Read the record of one of a category's models; "": of its current one.

        Raises:
            ModelDamagedError: if there is no such model, or its record was changed or is of another version.
            ModelUnreadableError: if storage failed.
        """
        model_id = model_id or self.current(category).model_id
        uri = storage.join(self.folder(category), model_id, _RECORD)
        try:
            record = _read_record(ModelRecord, uri)
        except FileNotFoundError as error:
            raise ModelDamagedError(
                f"{self.uri}: no model {model_id} for category {category!r}; {self._list_command()} lists the others"
            ) from error
        if (record.category, record.model_id) != (category, model_id):
            # A copied folder, or a disk where names that differ only in case are one.
            raise ModelDamagedError(
                f"{uri}: its contents are those of {record.model_id} of category {record.category!r}; fit the model "
                "again"
            )
        return record

    def check_sizes(self, record: ModelRecord) -> None:
        """Compare the sizes of a model's files with its record, by one listing and without reading the files.

        Raises:
            ModelDamagedError: if a file is missing or of another size. Another byte is found when the file is read.
            ModelUnreadableError: if storage failed.
        """
        folder = storage.join(self.folder(record.category), record.model_id)
        with _reading(folder):
            sizes = dict(storage.file_sizes(folder))
        for name, file in record.files.items():
            uri = self._uri(record, name)
            if uri not in sizes:
                raise _missing(uri)
            if sizes[uri] != file.size:
                raise ModelDamagedError(f"{uri}: has {sizes[uri]} bytes, {file.size} expected; fit the model again")

    def read_files(self, record: ModelRecord) -> dict[str, bytes]:
        """Read the contents of a model's files, by name, and verify each by its digest.

        Raises:
            ModelDamagedError: if one is missing or damaged.
            ModelUnreadableError: if storage failed.
        """
        return {name: self.read_file(record, name) for name in record.files}

    def load(self, category: str, model_id: str = "") -> Model:
        """Load one of a category's models, "": its current one, and verify each file. Raise as `read_files` does."""
        from stpm.method.memory_bank import banks_from_tensors

        record = self.record(category, model_id)
        scores, max_pixels = self.calibration_scores(record).select(["score", "max_pixel"]).columns
        student = self._tensors(record, STUDENT) if STUDENT in record.files else None
        memory = banks_from_tensors(self._tensors(record, MEMORY)) if MEMORY in record.files else ()
        calibration = Calibration(scores.to_numpy(), record.heatmap_scale, np.sort(max_pixels.to_numpy()))
        return Model(record, student, memory, calibration)

    def image_statistics(self, record: ModelRecord) -> pa.Table:
        """Read the statistics of the good images of a model, a row each, as `encode_model` got them."""
        return self._table(record, IMAGE_STATISTICS)

    def folder(self, category: str) -> str:
        """Return the folder of a category."""
        return storage.join(self.uri, safe_name(category, "category"))

    def checkpoint_uri(self, category: str) -> str:
        """Return the URI of the checkpoint of a running fit."""
        return storage.join(self.folder(category), _CHECKPOINT)

    def history(self, record: ModelRecord) -> pa.Table:
        """Read the losses per epoch, in columns of `stpm.fitting.task.Epoch`; the table is empty without a student."""
        return self._table(record, _HISTORY) if _HISTORY in record.files else pa.table({})

    def _tensors(self, record: ModelRecord, name: str) -> StateDict:
        from stpm.method.backbones import deserialise

        return deserialise(self.read_file(record, name), self._uri(record, name))

    def _table(self, record: ModelRecord, name: str) -> pa.Table:
        return storage.decode_parquet(self.read_file(record, name))

    def read_file(self, record: ModelRecord, name: str) -> bytes:
        """Read the contents of one of a model's files. Raise as `read_files` does."""
        return _read_verified(self._uri(record, name), record.files[name].digest)

    def _uri(self, record: ModelRecord, name: str) -> str:
        return storage.join(self.folder(record.category), record.model_id, name)

    def _current_uri(self, category: str) -> str:
        return storage.join(self.folder(category), _CURRENT)

    def _teacher_uri(self, digest: str) -> str:
        return storage.join(self.uri, _TEACHERS, f"{digest}.safetensors")


def _read_verified(uri: str, digest: str) -> bytes:
    try:
        with _reading(uri):
            data = storage.read(uri)
    except FileNotFoundError as error:
        raise _missing(uri) from error
    if (found := storage.digest(data)) != digest:
        # A fit that is started again sees the size alone.
        raise ModelDamagedError(
            f"{uri}: its SHA-256 is {found}, {digest} expected; remove the file, and fit the model again"
        )
    return data


def _read_record(kind: type[T], uri: str) -> T:
    try:
        with _reading(uri):
            return from_json(kind, storage.read(uri))
    except ValueError as error:
        raise ModelDamagedError(f"{uri}: cannot be read by this version: {error}; fit the model again") from error


def _missing(uri: str) -> ModelDamagedError:
    return ModelDamagedError(f"{uri}: no such file; fit the model again")


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    """Raise ModelUnreadableError if storage fails, but FileNotFoundError as it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ModelUnreadableError(f"{uri}: cannot be read: {error}; run the same command again when it can") from error
