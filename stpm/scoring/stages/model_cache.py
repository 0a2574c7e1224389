"""The teachers and models that a scorer holds in memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar
from weakref import WeakValueDictionary

import torch

from stpm.errors import ImageError, ModelError, ModelUnreadableError, one_line
from stpm.method.arithmetic import Arithmetic
from stpm.method.device import is_out_of_memory
from stpm.method.forward import Matcher
from stpm.models.record import ModelRecord
from stpm.models.store import Model, ModelStore

# Time until a model that could not be loaded is tried again.
_RETRY_SECONDS = 60.0

T = TypeVar("T")


class ModelCache:
    """Matchers and models of a store, by category.

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
        self._matchers: WeakValueDictionary[tuple[object, ...], Matcher] = WeakValueDictionary()
        # Each model with its matcher, which stays in memory as long as a model that uses it.
        self._models: OrderedDict[str, tuple[Model, Matcher]] = OrderedDict()
        self._failures: dict[str, tuple[str, str, float]] = {}

    def matcher_key(self, category: str) -> tuple[object, ...]:
        """Return what the matcher of a category is made from. Categories of one key share it.

        Raises:
            ImageError: if the record cannot be loaded.
        """
        return self._load(category, self._find_key)

    def matcher(self, category: str) -> Matcher:
        """Return the matcher of a category, see `matcher_key`.

        Raises:
            ImageError: if the record or the teacher cannot be loaded.
        """
        return self._load(category, self._load_matcher)

    def model(self, category: str) -> Model:
        """Return the model of a category.

        Raises:
            ImageError: if it cannot be loaded.
        """
        return self._load(category, self._load_model)

    def _find_key(self, category: str) -> tuple[object, ...]:
        record = self._record(category)
        precision = self._arithmetic.precision_to_score(record.precision)
        return record.teacher_digest, record.recipe.levels, record.preprocessing, precision

    def _load_matcher(self, category: str) -> Matcher:
        key = self._find_key(category)
        matcher = self._matchers.get(key)
        if not matcher:
            record = self._record(category)
            teacher = self._store.load_teacher(record.recipe.teacher, record.recipe.levels, record.teacher_digest)
            precision = self._arithmetic.precision_to_score(record.precision)
            matcher = Matcher(teacher, record.preprocessing, self._device, precision, self._arithmetic.backend)
            self._matchers[key] = matcher
        return matcher

    def _load_model(self, category: str) -> Model:
        if category not in self._models:
            matcher = self._load_matcher(category)
            model = self._store.load(category, self._record(category).model_id).to(self._device)
            model = replace(model, parts=matcher.compile(model.parts))
            self._models[category] = model, matcher
            while len(self._models) > 1 and self._nbytes() > self._max_bytes:
                self._models.popitem(last=False)
        self._models.move_to_end(category)
        return self._models[category][0]

    def _nbytes(self) -> int:
        matchers = {matcher for _, matcher in self._models.values()}
        return sum(model.parts.nbytes for model, _ in self._models.values()) + sum(m.teacher.nbytes for m in matchers)

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
            self._models.clear()
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
