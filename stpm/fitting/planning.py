"""Plan fits: reuse the models that a store holds already, and leave the others to workers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

from stpm.errors import DataError, ModelDamagedError, ModelUnreadableError, NoModelError
from stpm.fitting.task import FitResult, FitTask
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.models.versions import Version

log = logging.getLogger(__name__)


def plan_fit(task: FitTask) -> FitResult | None:
    """Return the result of a task that fails at once, or whose model is there already; None if a worker must fit it."""
    try:
        task.recipe.check_image_count(len(task.train))
        record = _reused_model(task)
    except (DataError, ModelUnreadableError) as error:
        # A model that cannot be read may be intact: do not replace it.
        log.error(f"{task.key}: failed: {error}", extra={"category": task.category})
        return FitResult(task, reason=str(error))
    return FitResult(task, record) if record else None


def _reused_model(task: FitTask) -> ModelRecord | None:
    """Return the current model if it need not be fitted again; else say what its successor replaces."""
    store = ModelStore(task.store)
    try:
        versions = store.versions(task.category)
        # A model is reused even if images were added to its calibration since.
        if model := existing_model(task, (versions.current,)):
            _log(task, f"model {model.model_id} is there already, with this recipe and these images")
            return model
        current = store.record(task.category, versions.current.model_id)
    except NoModelError:
        return None
    except ModelDamagedError as error:
        _log(task, f"fitted again: {error}")
        return None
    if model := existing_model(task, versions.next):
        _log(
            task,
            f"model {model.model_id}, of this recipe and these images, was rolled back, and {current.model_id} stays "
            f"current. To roll forward: {store.roll_command(task.category, '--roll-forward')}",
        )
        return current
    if replaced := versions.describe_replaced():
        _log(task, replaced)
    if added := len(current.added_images):
        _log(
            task,
            f"a new model begins without the images that were added to {current.model_id} ({added}): give their tables "
            "to --add-good again",
        )
    return None


def _log(task: FitTask, message: str) -> None:
    log.info(f"{task.key}: {message}", extra={"category": task.category})


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
        _log(task, f"fitted again: {error}")
        return None
    return record
