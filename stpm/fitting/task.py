"""One category's fit with its input and output: images from storage, a model into the store."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from stpm import images, storage
from stpm.errors import DataError, ImageError, ModelError
from stpm.fitting.loop import Epoch, fit
from stpm.forward import Matcher, pick_device, resolve_precision
from stpm.models import FitSummary, ModelRecord, ModelStore
from stpm.mvtec import Category
from stpm.recipe import Recipe

_READERS = 8
_SHOWN_FILES = 5


@dataclass(frozen=True)
class FitTask:
    """A student to fit: the category's images, how, and the store that it goes to.

    `train` holds URIs with sizes in bytes.
    """

    category: str
    train: tuple[tuple[str, int], ...]
    recipe: Recipe
    store: str
    teacher_digest: str

    @classmethod
    def of(cls, category: Category, recipe: Recipe, store: str, teacher_digest: str) -> FitTask:
        return cls(category.name, category.train, recipe, store, teacher_digest)

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
        """Changes when a training image is added, removed, renamed or resized (of its listing, not its bytes)."""
        lines = (f"{uri.rsplit('/', 1)[-1]}\t{size}\n" for uri, size in self.train)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def existing(self) -> ModelRecord | None:
        """The model in the store, if it is the one that this task would make."""
        try:
            record = ModelStore(self.store).record(self.category)
        except ModelError:
            return None
        ours = (self.recipe, self.teacher_digest, self.data_fingerprint)
        return record if ours == (record.recipe, record.teacher_digest, record.data_fingerprint) else None


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


def run_task(task: FitTask, on_epoch: Callable[[Epoch], None]) -> Outcome:
    """Fit and publish one model.

    Raises:
        StpmError: if the images, the teacher or the loss forbid it.
    """
    start = time.perf_counter()
    store = ModelStore(task.store)
    device = pick_device()
    precision = resolve_precision(task.recipe.precision, device)
    matcher = Matcher(store.load_teacher(task.recipe, task.teacher_digest), task.recipe, device, precision)
    fitted = fit(load_pixels([uri for uri, _ in task.train], task.recipe.size), matcher, task.recipe, on_epoch)
    record = store.save(
        category=task.category,
        recipe=task.recipe,
        precision=precision,
        teacher_digest=task.teacher_digest,
        data_fingerprint=task.data_fingerprint,
        student=fitted.student,
        calibration=fitted.calibration,
        history=pa.Table.from_pylist([dataclasses.asdict(epoch) for epoch in fitted.history]),
        fit=FitSummary(
            seconds=time.perf_counter() - start,
            epochs=len(fitted.history),
            kept_epoch=fitted.kept.number,
            train_loss=fitted.kept.train_loss,
            validation_loss=fitted.kept.validation_loss,
            train_count=fitted.train_count,
            validation_count=fitted.validation_count,
            device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        ),
    )
    return Outcome.done(task, record, "fitted")


def load_pixels(uris: list[str], size: int) -> images.Pixels:
    """Decode images into one (N, size, size, 3) uint8 array.

    Raises:
        DataError: naming the files that cannot be read. A student is not fitted on what is left, since a set that
            lost images silently is not the set that its owner chose.
    """
    pixels = np.empty((len(uris), size, size, 3), np.uint8)
    problems: list[str] = []

    def load(index: int) -> None:
        try:
            pixels[index] = images.decode(storage.read(uris[index]), size).pixels
        except (ImageError, OSError) as error:
            problems.append(f"{uris[index]}: {error}")

    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(load, range(len(uris))))
    if problems:
        shown = "; ".join(sorted(problems)[:_SHOWN_FILES])
        more = f"; and {len(problems) - _SHOWN_FILES} more" if len(problems) > _SHOWN_FILES else ""
        raise DataError(
            f"{len(problems)} of {len(uris)} training images cannot be read: {shown}{more}; repair or remove them"
        )
    return pixels
