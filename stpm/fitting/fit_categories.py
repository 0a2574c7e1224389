"""Fit all categories of a data set: read them, reuse the models that exist, and fit the others on workers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from stpm import storage
from stpm.cluster.connection import connected, working_nodes
from stpm.console import is_terminal, show_progress
from stpm.data import mvtec
from stpm.errors import DataError, ModelError
from stpm.fitting.fit_category import existing_model
from stpm.fitting.options import WorkerOptions
from stpm.fitting.progress import FitProgress
from stpm.fitting.task import FitResult, FitTask
from stpm.fitting.training_images import choose_normalisation
from stpm.fitting.worker_group import run_worker_group
from stpm.fitting.worker_resources import choose_worker_resources
from stpm.lease import held
from stpm.method.backbones import load_teacher_weights
from stpm.method.calibration import GoodCounts, few_good_images_warning
from stpm.method.recipe import Recipe
from stpm.models.store import ModelStore
from stpm.options import WantedBackend

log = logging.getLogger(__name__)

_LISTING_THREADS = 16
_READER_THREADS = 8


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

    with ThreadPoolExecutor(_LISTING_THREADS) as threads:
        found = dict(zip(names, threads.map(read, names), strict=True))
    failures = {name: str(result) for name, result in found.items() if isinstance(result, DataError)}
    for name, reason in failures.items():
        log.info(f"{name}: failed: {reason}", extra={"category": name})
    return [result for result in found.values() if isinstance(result, mvtec.Category)], failures


def warn_about_few_good_images(categories: Sequence[mvtec.Category], recipe: Recipe, false_alarm_rate: float) -> None:
    """Warn about categories with too few good images to calibrate for a false-alarm rate."""
    counts = {each.name: GoodCounts(len(each.train), recipe.calibration_count(len(each.train))) for each in categories}
    if warning := few_good_images_warning(counts, false_alarm_rate):
        log.info(warning)


def fit_categories(
    categories: Sequence[mvtec.Category],
    recipe: Recipe,
    stores: Mapping[int, str],
    workers: WorkerOptions,
    backend: WantedBackend,
    wait: bool,
) -> list[FitResult]:
    """Fit one model per category and seed. Undamaged models that the stores already hold are reused.

    Each store is locked by a lease meanwhile.

    Args:
        categories: to fit.
        recipe: of all models, without the seed.
        stores: URI of the model store for each seed.
        workers: options of the workers.
        backend: what computes features on a CPU.
        wait: if another run holds a store, wait for its end instead of raising an error.

    Returns:
        One result per category and seed.

    Raises:
        ConfigError: if the teacher or its normalisation is unknown, the workers do not fit the cluster, or another
            run holds a store.
    """
    weights = load_teacher_weights(recipe.teacher, recipe.teacher_weights, recipe.levels)
    # Raise the error of an unknown normalisation once, and not in each category.
    choose_normalisation(recipe)
    with ExitStack() as leases:
        tasks: list[FitTask] = []
        for seed, store in stores.items():
            leases.enter_context(held(store, wait))
            digest = ModelStore(store).put_teacher(weights)
            for category in categories:
                adapted = dataclasses.replace(recipe, seed=seed).for_image_count(len(category.train))
                tasks.append(FitTask(category.name, category.train, adapted, store, digest, backend))
        with ThreadPoolExecutor(_READER_THREADS) as threads:
            existing = list(threads.map(_existing_result, tasks))
        for task, (_, message) in zip(tasks, existing, strict=True):
            if message:
                log.info(f"{task.key}: {message}", extra={"category": task.category})
        results = [result for result, _ in existing if result]
        unfinished = [task for task, (result, _) in zip(tasks, existing, strict=True) if not result]
        if unfinished:
            scratch = storage.join(next(iter(stores.values())), ".train")
            with connected():
                progress = FitProgress(unfinished, show_progress if is_terminal() else None)
                resources = choose_worker_resources(workers, working_nodes(), len(tasks))
                results += run_worker_group(unfinished, workers, resources, scratch, progress)
        return results


def _existing_result(task: FitTask) -> tuple[FitResult | None, str]:
    """Return the result of a task that needs no worker, else None; and a message for the log, or ""."""
    try:
        task.recipe.check_image_count(len(task.train))
        model = existing_model(task)
    except DataError as error:
        return FitResult(task, reason=str(error)), f"failed: {error}"
    except ModelError as error:
        return None, f"fitted again: {error}"
    if model is None:
        return None, ""
    return FitResult(task, model), f"model {model.model_id} is there already, with this recipe and these images"
