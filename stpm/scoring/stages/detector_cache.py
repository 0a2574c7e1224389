"""The detectors that a scorer holds in memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from stpm.detector import Detector, TeacherSpec, load_teacher
from stpm.errors import ImageError, ModelError, ModelUnreadableError, one_line
from stpm.method.arithmetic import Arithmetic
from stpm.method.device import is_out_of_memory
from stpm.method.teacher import Teacher
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore

# Time until a model that could not be loaded is tried again.
_RETRY_SECONDS = 60.0

T = TypeVar("T")


class DetectorCache:
    """Detectors of a store's models, by category.

    Args:
        store: the store to load from.
        device: the device to load onto.
        max_bytes: maximum bytes of models and teachers. The most recently used models stay, at least one.
        model_ids: the model of each category.
        arithmetic: what computes features.
    """

    def __init__(
        self,
        store: ModelStore,
        device: torch.device,
        max_bytes: int,
        model_ids: Mapping[str, str],
        arithmetic: Arithmetic,
    ) -> None:
        self._store = store
        self._device = device
        self._max_bytes = max_bytes
        self._model_ids = model_ids
        self._arithmetic = arithmetic
        self._records: dict[str, ModelRecord] = {}
        # A detector keeps its teacher in memory.
        self._detectors: OrderedDict[str, Detector] = OrderedDict()
        self._failures: dict[str, tuple[str, str, float]] = {}

    def teacher_spec(self, category: str) -> TeacherSpec:
        """Return what the teacher of a category is made from. Categories of one spec share it.

        Raises:
            ImageError: if the record cannot be loaded.
        """
        return self._load(category, self._teacher_spec)

    def teacher(self, category: str) -> Teacher:
        """Return the teacher of a category, see `teacher_spec`.

        Raises:
            ImageError: if the record or the teacher cannot be loaded.
        """
        return self._load(category, self._load_teacher)

    def detector(self, category: str) -> Detector:
        """Return the detector of a category.

        Raises:
            ImageError: if it cannot be loaded.
        """
        return self._load(category, self._load_detector)

    def _teacher_spec(self, category: str) -> TeacherSpec:
        return TeacherSpec.of_model(self._record(category), self._device, self._arithmetic)

    def _load_teacher(self, category: str) -> Teacher:
        return load_teacher(self._store, self._teacher_spec(category))

    def _load_detector(self, category: str) -> Detector:
        if category not in self._detectors:
            teacher = self._load_teacher(category)
            model = self._store.load(category, self._record(category).model_id)
            self._detectors[category] = Detector.from_model(model, teacher)
            while len(self._detectors) > 1 and self._nbytes() > self._max_bytes:
                self._detectors.popitem(last=False)
        self._detectors.move_to_end(category)
        return self._detectors[category]

    def _nbytes(self) -> int:
        teachers = {detector.teacher for detector in self._detectors.values()}
        return sum(detector.nbytes for detector in self._detectors.values()) + sum(
            teacher.backbone.nbytes for teacher in teachers
        )

    def _record(self, category: str) -> ModelRecord:
        if category not in self._records:
            self._records[category] = self._store.record(category, self._model_ids[category])
        return self._records[category]

    def _load(self, category: str, load: Callable[[str], T]) -> T:
        """Load something of a category. If the memory does not suffice, drop all models and try once more.

        Raises:
            ImageError: if it cannot be loaded. For a minute, this is repeated instead of loading again.
        """
        kind, message, since = self._failures.get(category, ("", "", 0.0))
        if kind and time.monotonic() - since < _RETRY_SECONDS:
            raise ImageError(kind, message)
        try:
            try:
                return load(category)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the except block, no traceback keeps the tensors alive.
            self._detectors.clear()
            torch.cuda.empty_cache()
            return load(category)
        except ModelError as error:
            kind = "model_unreadable" if isinstance(error, ModelUnreadableError) else "model_damaged"
            failure = ImageError(kind, str(error))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = ImageError("out_of_memory", f"no memory for the model of {category}: {one_line(error)}")
        self._failures[category] = failure.kind, str(failure), time.monotonic()
        raise failure
