"""The teachers and models that a scorer holds in memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch

from stpm.errors import ImageError, ModelError, ModelUnreadableError
from stpm.method.forward import Matcher
from stpm.models.record import ModelRecord
from stpm.models.store import Model, ModelStore
from stpm.options import Backend

# Time until a model that could not be loaded is tried again.
_RETRY_SECONDS = 60.0


class ModelCache:
    """Matchers and models of a store, by category.

    Args:
        store: the store to load from.
        device: the device to load onto.
        max_bytes: weights of models to keep, the most recently used ones; at least one model is kept.
        model_ids: the model of each category, and of no other; None: the store's current models.
        backend: what computes features.
    """

    def __init__(
        self,
        store: ModelStore,
        device: torch.device,
        max_bytes: int,
        model_ids: Mapping[str, str] | None = None,
        backend: Backend = "eager",
    ) -> None:
        self._store = store
        self._device = device
        self._max_bytes = max_bytes
        self._model_ids = model_ids
        self._backend = backend
        self._records: dict[str, ModelRecord] = {}
        self._matchers: dict[tuple[object, ...], Matcher] = {}
        self._models: OrderedDict[str, tuple[Model, int]] = OrderedDict()
        self._failures: dict[str, tuple[str, str, float]] = {}

    def matcher(self, category: str) -> Matcher:
        """Return the matcher of a category. Categories share one if they share the teacher and its input.

        Raises:
            ImageError: if the category has no model, or the record or the teacher cannot be loaded.
        """
        with self._loading(category):
            record = self._record(category)
            recipe = record.recipe
            key = (record.teacher_digest, recipe.levels, record.preprocessing, record.precision)
            if key not in self._matchers:
                teacher = self._store.load_teacher(recipe.teacher, recipe.levels, record.teacher_digest)
                self._matchers[key] = Matcher(
                    teacher, record.preprocessing, self._device, record.precision, self._backend
                )
            return self._matchers[key]

    def model(self, category: str) -> Model:
        """Return the model of a category.

        Raises:
            ImageError: if it cannot be loaded.
        """
        with self._loading(category):
            if category not in self._models:
                model = self._store.load(category, self._record(category).model_id).to(self._device)
                model = replace(model, parts=self.matcher(category).compile(model.parts))
                self._models[category] = model, model.parts.nbytes
                while len(self._models) > 1 and sum(size for _, size in self._models.values()) > self._max_bytes:
                    self._models.popitem(last=False)
            self._models.move_to_end(category)
            return self._models[category][0]

    def _record(self, category: str) -> ModelRecord:
        if category not in self._records:
            self._records[category] = self._store.record(category, (self._model_ids or {}).get(category, ""))
        return self._records[category]

    @contextmanager
    def _loading(self, category: str) -> Iterator[None]:
        """Raise a ModelError as an ImageError. For a minute, repeat it instead of loading again."""
        if self._model_ids is not None and category not in self._model_ids:
            raise ImageError("no_model", f"{self._store.uri}: category {category!r} had no model when this run began")
        kind, message, since = self._failures.get(category, ("", "", 0.0))
        if kind and time.monotonic() - since < _RETRY_SECONDS:
            raise ImageError(kind, message)
        try:
            yield
        except ModelError as error:
            kind = "model_unreadable" if isinstance(error, ModelUnreadableError) else "model_damaged"
            self._failures[category] = kind, str(error), time.monotonic()
            raise ImageError(kind, str(error)) from error
