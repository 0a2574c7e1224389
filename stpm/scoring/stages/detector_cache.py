"""The detectors that a scorer holds in memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from stpm.detector import Detector
from stpm.errors import ImageError, ModelError, ModelUnreadableError, one_line
from stpm.method.arithmetic import Arithmetic
from stpm.method.device import is_out_of_memory
from stpm.method.teacher import Teacher
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.shared_teachers import TeacherSpec, load_teacher

# Time until a model that could not be loaded is tried again.
_RETRY_SECONDS = 60.0

T = TypeVar("T")


class DetectorCache:
    """Detectors by category, on a device.

    The models that were used most recently stay: at least one, and as many as fit `max_bytes` with their teachers.
    """

    def __init__(
        self,
        store: ModelStore,
        models: Mapping[str, ModelRecord],
        device: torch.device,
        arithmetic: Arithmetic,
        max_bytes: int,
    ) -> None:
        self._store = store
        self._models = models
        self._device = device
        self._arithmetic = arithmetic
        self._max_bytes = max_bytes
        # A detector keeps its teacher in memory.
        self._detectors: OrderedDict[str, Detector] = OrderedDict()
        self._specs: dict[str, TeacherSpec] = {}
        self._failures: dict[str, tuple[ImageError, float]] = {}

    def teacher_spec(self, category: str) -> TeacherSpec:
        """Return what the teacher of a category is made from. Categories of one spec share it."""
        # A scorer asks for each image.
        if category not in self._specs:
            self._specs[category] = TeacherSpec.of_model(self._models[category], self._device, self._arithmetic)
        return self._specs[category]

    def teacher(self, category: str) -> Teacher:
        """Return the teacher of a category, see `teacher_spec`. Raise ImageError if it cannot be loaded."""
        return self._load(category, self._load_teacher)

    def detector(self, category: str) -> Detector:
        """Return the detector of a category. Raise ImageError if it cannot be loaded."""
        if category not in self._detectors:
            self._detectors[category] = self._load(category, self._load_detector)
            while len(self._detectors) > 1 and self._nbytes() > self._max_bytes:
                self._detectors.popitem(last=False)
        self._detectors.move_to_end(category)
        return self._detectors[category]

    def _load_teacher(self, category: str) -> Teacher:
        return load_teacher(self._store, self.teacher_spec(category))

    def _load_detector(self, category: str) -> Detector:
        teacher = self._load_teacher(category)
        return Detector.from_model(self._store.load(category, self._models[category].model_id), teacher)

    def _nbytes(self) -> int:
        teachers = {detector.teacher for detector in self._detectors.values()}
        return sum(each.nbytes for each in self._detectors.values()) + sum(each.nbytes for each in teachers)

    def _load(self, category: str, load: Callable[[str], T]) -> T:
        """Load something of a category. If the memory does not suffice, drop all models and try once more.

        Raises:
            ImageError: if it cannot be loaded. For a minute, this is repeated instead of loading again.
        """
        if category in self._failures:
            failure, since = self._failures[category]
            if time.monotonic() - since < _RETRY_SECONDS:
                raise ImageError(failure.kind, str(failure))
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
        self._failures[category] = failure, time.monotonic()
        raise failure
