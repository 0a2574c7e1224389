"""The teachers and models that a scorer holds in memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

import torch

from stpm.errors import ImageError, ModelError, ModelUnreadableError
from stpm.method.forward import Matcher
from stpm.models.record import ModelRecord
from stpm.models.store import Model, ModelStore
from stpm.options import Backend

# Time until a model that could not be loaded is tried again.
_RETRY_SECONDS = 60.0

_MatcherKey = tuple[object, ...]


@dataclass(frozen=True)
class _LoadedModel:
    """A model with its matcher, which is in memory as long as a model that uses it."""

    model: Model
    matcher: Matcher


class ModelCache:
    """Matchers and models of a store, by category.

    Args:
        store: the store to load from.
        device: the device to load onto.
        max_bytes: weights of models and of their teachers to keep, those of the most recently used models; at least
            one model is kept.
        model_ids: the model of each category.
        backend: what computes features.
    """

    def __init__(
        self,
        store: ModelStore,
        device: torch.device,
        max_bytes: int,
        model_ids: Mapping[str, str],
        backend: Backend = "eager",
    ) -> None:
        self._store = store
        self._device = device
        self._max_bytes = max_bytes
        self._model_ids = model_ids
        self._backend = backend
        self._records: dict[str, ModelRecord] = {}
        self._matchers: WeakValueDictionary[_MatcherKey, Matcher] = WeakValueDictionary()
        self._models: OrderedDict[str, _LoadedModel] = OrderedDict()
        self._failures: dict[str, tuple[str, str, float]] = {}

    def matcher(self, category: str) -> Matcher:
        """Return the matcher of a category. Categories share one if they share the teacher and its input.

        Raises:
            ImageError: if the record or the teacher cannot be loaded.
        """
        with self._loading(category):
            record = self._record(category)
            recipe, key = record.recipe, _matcher_key(record)
            matcher = self._matchers.get(key)
            if not matcher:
                teacher = self._store.load_teacher(recipe.teacher, recipe.levels, record.teacher_digest)
                matcher = Matcher(teacher, record.preprocessing, self._device, record.precision, self._backend)
                self._matchers[key] = matcher
            return matcher

    def model(self, category: str) -> Model:
        """Return the model of a category.

        Raises:
            ImageError: if it cannot be loaded.
        """
        with self._loading(category):
            if category not in self._models:
                matcher = self.matcher(category)
                model = self._store.load(category, self._record(category).model_id).to(self._device)
                model = replace(model, parts=matcher.compile(model.parts))
                self._models[category] = _LoadedModel(model, matcher)
                while len(self._models) > 1 and self._nbytes() > self._max_bytes:
                    self._models.popitem(last=False)
            self._models.move_to_end(category)
            return self._models[category].model

    def _nbytes(self) -> int:
        matchers = {loaded.matcher for loaded in self._models.values()}
        parts = (loaded.model.parts for loaded in self._models.values())
        return sum(part.nbytes for part in parts) + sum(matcher.teacher.nbytes for matcher in matchers)

    def _record(self, category: str) -> ModelRecord:
        if category not in self._records:
            self._records[category] = self._store.record(category, self._model_ids[category])
        return self._records[category]

    @contextmanager
    def _loading(self, category: str) -> Iterator[None]:
        """Raise a ModelError as an ImageError. For a minute, repeat it instead of loading again."""
        kind, message, since = self._failures.get(category, ("", "", 0.0))
        if kind and time.monotonic() - since < _RETRY_SECONDS:
            raise ImageError(kind, message)
        try:
            yield
        except ModelError as error:
            kind = "model_unreadable" if isinstance(error, ModelUnreadableError) else "model_damaged"
            self._failures[category] = kind, str(error), time.monotonic()
            raise ImageError(kind, str(error)) from error


def _matcher_key(record: ModelRecord) -> _MatcherKey:
    """Return what models that share a matcher have in common: the teacher and its input."""
    return record.teacher_digest, record.recipe.levels, record.preprocessing, record.precision
