"""Fit all categories of a data set: read them, reuse the models that exist, and fit the others on workers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from stpm import storage
from stpm.cluster.connection import connected, working_nodes
from stpm.console import is_terminal, show_progress
from stpm.data import mvtec
from stpm.errors import DataError, ModelError, ModelUnreadableError, NoModelError
from stpm.fitting.added_normals import with_added_normals
from stpm.fitting.options import WorkerOptions
from stpm.fitting.progress import FitProgress
from stpm.fitting.task import FitResult, FitTask
from stpm.fitting.training_images import choose_normalisation
from stpm.fitting.worker_group import run_worker_group
from stpm.fitting.worker_resources import choose_worker_resources
from stpm.lease import hold_lease
from stpm.method.backbones import load_teacher_weights
from stpm.method.recipe import Recipe
from stpm.models.record import AddedNormal, ModelRecord
from stpm.models.store import ModelStore
from stpm.options import WantedBackend

log = logging.getLogger(__name__)


def read_categories(root: str, wanted: Sequence[str]) -> tuple[list[mvtec.Category], dict[str, str]]:
    """List the images of each category; return the usable categories, and the reason by name for the others.

    Args:
        root: URI of the data set.
        wanted: names of categories; empty: all.

    Raises:
        DataError: if the data set is missing or empty, or a wanted category does not exist.
    """
    names = mvtec.find_categories(root, wanted)

    def read(name: str) -> mvtec.Category | DataError:
        try:
            return mvtec.read_category(root, name)
        except DataError as error:
            return error

    found = dict(zip(names, storage.in_parallel(read, names), strict=True))
    failures = {name: str(result) for name, result in found.items() if isinstance(result, DataError)}
    for name, reason in failures.items():
        log.info(f"{name}: failed: {reason}", extra={"category": name})
    return [result for result in found.values() if isinstance(result, mvtec.Category)], failures


def count_good_images(categories: Sequence[mvtec.Category], recipe: Recipe) -> dict[str, tuple[int, int]]:
    """Count the good images of each category, and those that will calibrate its model."""
    return {each.name: (len(each.train), recipe.calibration_count(len(each.train))) for each in categories}


def fit_categories(
    categories: Sequence[mvtec.Category],
    recipe: Recipe,
    stores: Mapping[int, str],
    workers: WorkerOptions,
    backend: WantedBackend,
    wait: bool,
    new_normals: Mapping[str, Sequence[AddedNormal]] | None = None,
) -> list[FitResult]:
    """Fit one model per category and seed. Reuse undamaged models that the stores already hold.

    Hold a lease on each store meanwhile. Images that were added to a category's current model are among the training
    images of the next one.

    Args:
        categories: to fit.
        recipe: of all models, without the seed.
        stores: URI of the model store for each seed.
        workers: options of the workers.
        backend: what computes features on a CPU.
        wait: if another run holds a store, wait for its end instead of raising an error.
        new_normals: by category. Fit on them too, and on all images that were added before; stage the models instead of
            making them current.

    Returns:
        One result per category and seed.

    Raises:
        ConfigError: if the teacher or its normalisation is unknown, the workers do not fit the cluster, or another
            run holds a store.
    """
    weights = load_teacher_weights(recipe.teacher, recipe.teacher_weights, recipe.levels)
    # Raise the error of an unknown normalisation once, instead of in each category.
    choose_normalisation(recipe)
    with ExitStack() as leases:
        makers: list[_TaskMaker] = []
        for seed, store in stores.items():
            leases.enter_context(hold_lease(store, wait))
            digest = ModelStore(store).put_teacher(weights)
            seeded = dataclasses.replace(recipe, seed=seed)
            makers += [_TaskMaker(each, seeded, ModelStore(store), digest, backend) for each in categories]
        if new_normals is None:
            planned = storage.in_parallel(_plan, makers)
        else:
            planned = storage.in_parallel(lambda maker: _plan_refit(maker, new_normals[maker.category.name]), makers)
        for task, _, message in planned:
            if message:
                log.info(f"{task.key}: {message}", extra={"category": task.category})
        results = [result for _, result, _ in planned if result]
        unfinished = [task for task, result, _ in planned if not result]
        if unfinished:
            scratch = storage.join(next(iter(stores.values())), ".train")
            with connected():
                progress = FitProgress(unfinished, show_progress if is_terminal() else None)
                resources = choose_worker_resources(workers, working_nodes(), len(planned))
                results += run_worker_group(unfinished, workers, resources, scratch, progress)
        return results


@dataclass(frozen=True)
class _TaskMaker:
    """Make a task, given the images that were added."""

    category: mvtec.Category
    recipe: Recipe
    store: ModelStore
    teacher_digest: str
    backend: WantedBackend

    def added(self) -> tuple[AddedNormal, ...]:
        """Return the images that were added to the category's current model.

        Raises:
            ModelUnreadableError: if storage failed while the record was read.
        """
        name = self.category.name
        try:
            return self.store.record(name).added_normals
        except NoModelError:
            return ()
        except ModelUnreadableError:
            raise
        except ModelError as error:
            if storage.files(self.store.normals_folder(name)):
                log.info(f"{name}: fitted without the images that were added: {error}", extra={"category": name})
            return ()

    def describe_replaced(self) -> str:
        """Describe the models that are no longer versions after the fit."""
        try:
            return self.store.versions(self.category.name).describe_replaced()
        except ModelError:
            return ""

    def task(self, added: Sequence[AddedNormal], *, stage: bool = False) -> FitTask:
        train = with_added_normals(self.category, self.store, added)
        recipe = self.recipe.for_image_count(len(train))
        name, store = self.category.name, self.store.uri
        return FitTask(name, train, recipe, store, self.teacher_digest, self.backend, tuple(added), stage)


# A task, its result if it needs no worker, and a message for the log, or "".
_Plan = tuple[FitTask, FitResult | None, str]


def _plan(maker: _TaskMaker) -> _Plan:
    """Plan a fit. Reuse the model if images were added by calibration alone; otherwise fit on them too."""
    try:
        added = maker.added()
    except ModelUnreadableError as error:
        # A fit without the added images would lose them.
        task = maker.task(())
        return task, FitResult(task, reason=str(error)), f"failed: {error}"
    task = maker.task([each for each in added if each.fitted])
    if planned := _reuse(task):
        return planned
    if model := existing_model(task, waiting=True):
        current = maker.store.record(task.category)
        message = (
            f"model {model.model_id}, of this recipe and these images, was rolled back or staged, and "
            f"{current.model_id} stays current; jobs/models.py --categories {task.category} --roll-forward changes that"
        )
        return task, FitResult(task, current), message
    return maker.task(added), None, maker.describe_replaced()


def _plan_refit(maker: _TaskMaker, new: Sequence[AddedNormal]) -> _Plan:
    """Plan a fit on all images that were added."""
    task = maker.task([*maker.added(), *new], stage=True)
    if planned := _reuse(task):
        return planned
    if model := existing_model(task, waiting=True):
        return task, FitResult(task, model), f"model {model.model_id} of these images is there already"
    return task, None, ""


def _reuse(task: FitTask) -> _Plan | None:
    """Plan a task that cannot run, or whose model is there already; return None if it is to be fitted."""
    try:
        task.recipe.check_image_count(len(task.train))
    except DataError as error:
        return task, FitResult(task, reason=str(error)), f"failed: {error}"
    if model := existing_model(task):
        message = f"model {model.model_id} is there already, with this recipe and these images"
        return task, FitResult(task, model), message
    return None


def existing_model(task: FitTask, *, waiting: bool = False) -> ModelRecord | None:
    """Return the model in the store that the task would make again, if there is one, and it is not damaged.

    Args:
        task: to plan.
        waiting: look among the models that were staged or rolled back, instead of at the current one.
    """
    store = ModelStore(task.store)
    wanted = (task.recipe, task.teacher_digest, task.data_fingerprint)
    try:
        versions = store.versions(task.category)
    except ModelError:
        return None
    for version in versions.next if waiting else (versions.current,):
        try:
            record = store.record(task.category, version.model_id)
        except ModelError:
            continue
        if wanted != (record.recipe, record.teacher_digest, version.data_fingerprint):
            continue
        try:
            store.verify(record)
        except ModelError as error:
            log.info(f"{task.key}: fitted again: {error}", extra={"category": task.category})
            return None
        return record
    return None
