"""Plan fits: reuse the models that a store holds already, and make tasks of the others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from stpm import storage
from stpm.data.mvtec import Category
from stpm.errors import DataError, ModelDamagedError, ModelUnreadableError, NoModelError, StpmError
from stpm.fitting.added_images import with_added_images
from stpm.fitting.task import FitResult, FitTask
from stpm.method.recipe import Recipe
from stpm.models.record import AddedImage, ModelRecord
from stpm.models.store import ModelStore
from stpm.models.versions import Version, Versions

log = logging.getLogger(__name__)


class Plan(NamedTuple):
    """What is to be done for one category and seed.

    Args:
        task: the fit.
        result: the task's result if it needs no worker; None if it is to be fitted.
        message: a line for the log, or "".
        before: the category's versions before a fit whose model becomes current; None if it has none.
    """

    task: FitTask
    result: FitResult | None = None
    message: str = ""
    before: Versions | None = None


@dataclass(frozen=True)
class TaskMaker:
    """Make the tasks of one category and seed, given the images that were added.

    Args:
        category: the category, with its own training images.
        recipe: the user's recipe, with the seed.
        store: the store that the model goes to.
        teacher_digest: digest of the teacher's weights in that store.
    """

    category: Category
    recipe: Recipe
    store: ModelStore
    teacher_digest: str

    def stored(self) -> tuple[Versions | None, ModelRecord | None]:
        """Read the category's versions, and the record of the current one; None for what is not there or damaged.

        Raises:
            ModelUnreadableError: if storage failed while they were read.
        """
        name = self.category.name
        versions: Versions | None = None
        try:
            versions = self.store.versions(name)
            return versions, self.store.record(name, versions.current.model_id)
        except NoModelError:
            return None, None
        except ModelDamagedError as error:
            how = "without the images that were added" if storage.files(self.store.added_folder(name)) else "again"
            log.info(f"{name}: fitted {how}: {error}", extra={"category": name})
            return versions, None

    def task(self, added: Sequence[AddedImage], *, stage: bool = False) -> FitTask:
        """Make the task of a fit on the category's own images and on added ones; `stage` is that of `FitTask`."""
        train = with_added_images(self.category, self.store, added)
        return FitTask(
            category=self.category.name,
            train=train,
            recipe=self.recipe.for_image_count(len(train)),
            store=self.store.uri,
            teacher_digest=self.teacher_digest,
            added=tuple(added),
            stage=stage,
        )


def plan_fit(maker: TaskMaker, new: Sequence[AddedImage] | None = None) -> Plan:
    """Plan a fit, or with new images, which may be none, a refit.

    A refit is of all images that were added, before and now, and its model is staged.
    """
    try:
        return _plan_fit(maker) if new is None else _plan_refit(maker, new)
    except ModelUnreadableError as error:
        # The model may be intact, and a fit without its added images would lose them.
        return _fail(maker.task(new or (), stage=new is not None), error)


def _plan_fit(maker: TaskMaker) -> Plan:
    # A model is reused even if images were added to its calibration since; a new fit trains on those images too.
    versions, current = maker.stored()
    added = current.added_images if current else ()
    task = maker.task([image for image in added if image.fitted])
    if done := _plan_without_fit(task, versions):
        return done
    if versions and current and (model := existing_model(task, versions.next)):
        command = maker.store.roll_command(task.category, "--roll-forward")
        message = (
            f"model {model.model_id}, of this recipe and these images, was rolled back or staged, and "
            f"{current.model_id} stays current. To roll forward: {command}"
        )
        return Plan(task, FitResult(task, current), message)
    return Plan(maker.task(added), before=versions)


def _plan_refit(maker: TaskMaker, new: Sequence[AddedImage]) -> Plan:
    versions, current = maker.stored()
    added = current.added_images if current else ()
    task = maker.task([*added, *new], stage=True)
    if done := _plan_without_fit(task, versions):
        return done
    if versions and (model := existing_model(task, versions.next)):
        return Plan(task, FitResult(task, model), f"model {model.model_id} of these images is there already")
    return Plan(task)


def _plan_without_fit(task: FitTask, versions: Versions | None) -> Plan | None:
    """Plan a task that has too few images, or whose model is the current one; return None if it is neither."""
    try:
        task.recipe.check_image_count(len(task.train))
    except DataError as error:
        return _fail(task, error)
    if versions and (model := existing_model(task, (versions.current,))):
        message = f"model {model.model_id} is there already, with this recipe and these images"
        return Plan(task, FitResult(task, model), message)
    return None


def _fail(task: FitTask, error: StpmError) -> Plan:
    return Plan(task, FitResult(task, reason=str(error)), f"failed: {error}")


def existing_model(task: FitTask, versions: Sequence[Version]) -> ModelRecord | None:
    """Return the model that the task would make again, if it is among these versions, and its files have their sizes.

    Raises:
        ModelUnreadableError: if storage failed: the model may be there, and intact.
    """
    store = ModelStore(task.store)
    for version in versions:
        if version.data_fingerprint != task.data_fingerprint:
            continue
        with suppress(ModelDamagedError):
            record = store.record(task.category, version.model_id)
            if (record.recipe, record.teacher_digest) == (task.recipe, task.teacher_digest):
                break
    else:
        return None
    try:
        store.check_sizes(record)
    except ModelDamagedError as error:
        log.info(f"{task.key}: fitted again: {error}", extra={"category": task.category})
        return None
    return record
