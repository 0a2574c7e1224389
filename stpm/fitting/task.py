"""What a worker is asked, and what it tells. The queue that holds these computes nothing: no torch here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from stpm.data.mvtec import Category
from stpm.method.recipe import Recipe
from stpm.models.record import ModelRecord


@dataclass(frozen=True)
class FitTask:
    """A model to fit: the category's images, how, and the store that it goes to.

    `train` holds URIs with versions, as `stpm.storage.versions` gives them.
    """

    category: str
    train: tuple[tuple[str, str], ...]
    recipe: Recipe
    store: str
    teacher_digest: str

    @classmethod
    def of(cls, category: Category, recipe: Recipe, store: str, teacher_digest: str) -> FitTask:
        return cls(category.name, category.train, recipe.for_image_count(len(category.train)), store, teacher_digest)

    @property
    def key(self) -> str:
        """Names the task within one run."""
        return f"{self.category} (seed {self.recipe.seed})"

    @property
    def cost(self) -> int:
        """Image presentations: what its duration is proportional to."""
        return len(self.train) * self.recipe.epochs

    @cached_property
    def data_fingerprint(self) -> str:
        """Changes when a training image is added, removed, renamed or written anew. Taken from their listing."""
        lines = (f"{uri.rsplit('/', 1)[-1]}\t{version}\n" for uri, version in self.train)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """Of all that the model depends on, but the device."""
        parts = (repr(self.recipe), self.teacher_digest, self.data_fingerprint)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """How a task ended; `reason` says why it failed, `record` is the model otherwise."""

    key: str
    category: str
    seed: int
    status: Literal["fitted", "reused", "failed"]
    record: ModelRecord | None = None
    reason: str = ""

    @classmethod
    def failed(cls, task: FitTask, reason: str) -> Outcome:
        return cls(task.key, task.category, task.recipe.seed, "failed", reason=reason)

    @classmethod
    def done(cls, task: FitTask, record: ModelRecord, status: Literal["fitted", "reused"]) -> Outcome:
        return cls(task.key, task.category, task.recipe.seed, status, record)


@dataclass(frozen=True)
class Epoch:
    """Mean losses of one epoch (in [0, 2]), counted from 1, and its training speed."""

    number: int
    train_loss: float
    validation_loss: float
    images_per_second: float
