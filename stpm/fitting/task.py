"""One category's fit: the task, an epoch of it, and its result. Processes without torch import this module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from stpm import storage
from stpm.method.recipe import Recipe
from stpm.method.roi import Roi
from stpm.models.record import Decision, ModelRecord


@dataclass(frozen=True)
class FitTask:
    """A model to fit.

    Args:
        train: URI and version (see `stpm.storage.file_versions`) of each training image.
        roi: the part of the images that is inspected; None: all of them.
        rois: of each image with a region of interest of its own: the image's URI, the mask's, and its version.
        recipe: how to fit, with the epochs that `Recipe.for_image_count` gives it.
        store: URI of the store that the model goes to.
        teacher_digest: digest of the teacher's weights in that store.
        decision: the threshold that the model begins with, which neither reuses a model nor fits one again; None: none.
    """

    category: str
    train: tuple[tuple[str, str], ...]
    recipe: Recipe
    store: str
    teacher_digest: str
    roi: Roi | None = None
    rois: tuple[tuple[str, str, str], ...] = ()
    decision: Decision | None = None

    @property
    def key(self) -> str:
        """Name of the task, unique within one run."""
        return f"{self.category} (seed {self.recipe.seed})"

    @property
    def cost(self) -> int:
        """An estimate of the task's duration: images shown over all epochs."""
        return len(self.train) * (self.recipe.epochs if self.recipe.student != "none" else 1)

    @cached_property
    def data_fingerprint(self) -> str:
        """SHA-256 of the listing. It changes when a training image, or what of it is inspected, is another."""
        regions = [(uri, version) for _, uri, version in self.rois]
        return fingerprint([*self.train, *regions, *([("roi", repr(self.roi))] if self.roi else [])])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that the model depends on, except what computes it."""
        values = (repr(self.recipe), self.teacher_digest, self.data_fingerprint)
        return storage.digest("\n".join(values).encode())


def fingerprint(images: Sequence[tuple[object, str]]) -> str:
    """Return the SHA-256 of a listing of images: of the name of each file, and of each image's version."""
    lines = (f"{uri.rsplit('/', 1)[-1] if isinstance(uri, str) else ''}\t{version}\n" for uri, version in images)
    return storage.digest("".join(lines).encode())


class FitWarning(str):
    """A message of a fit that is logged as a warning."""


@dataclass(frozen=True)
class FitResult:
    """The result of a task: the model's record, or None if the task failed, with the reason; the node that fitted."""

    task: FitTask
    record: ModelRecord | None = None
    reason: str = ""
    node: str = ""


@dataclass(frozen=True)
class Epoch:
    """One epoch: its number, from 1, its mean losses, in [0, 2], and its training speed."""

    number: int
    train_loss: float
    validation_loss: float
    images_per_second: float


# A task's key with a finished epoch or a message, or the task's result.
Event = tuple[str, Epoch | str] | FitResult
