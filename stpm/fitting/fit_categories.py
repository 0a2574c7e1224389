"""Fit every category of a data set: plan the tasks, run the pool, tell what happens."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from stpm import storage
from stpm.cluster.connection import Resources, connected, working_nodes
from stpm.console import is_terminal, show_progress
from stpm.data import mvtec
from stpm.errors import DataError, ModelError
from stpm.fitting.event_files import EventFiles
from stpm.fitting.fit_category import existing_model
from stpm.fitting.options import PoolOptions
from stpm.fitting.progress import FitProgress
from stpm.fitting.task import FitTask, Outcome
from stpm.fitting.task_queue import Event
from stpm.fitting.training_images import normalisation_of
from stpm.fitting.worker_group import planned, run_pool, shared_out
from stpm.lease import held
from stpm.method.backbones import StateDict, load_teacher_weights
from stpm.method.calibration import NormalCounts, few_normals_warning
from stpm.method.recipe import Recipe
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore

log = logging.getLogger(__name__)

_LISTERS = 16
_READERS = 8


def fit_categories(
    categories: Sequence[mvtec.Category],
    recipe: Recipe,
    stores: Mapping[int, str],
    pool: PoolOptions,
    wait: bool,
) -> list[Outcome]:
    """Fit one model per category and seed, in one pool; what the stores already hold, and is sound, is reused.

    It holds each of the stores meanwhile.

    Args:
        categories: what to fit.
        recipe: how; its seed is replaced by each of the stores'.
        stores: model store by seed.
        pool: the workers.
        wait: for another run that holds a store, instead of refusing.

    Returns:
        One outcome per category and seed.

    Raises:
        ConfigError: if the teacher or its normalisation cannot be had, the workers do not fit the cluster, or another
            run holds a store.
    """
    weights = load_teacher_weights(recipe.teacher, recipe.teacher_weights, recipe.levels)
    # What cannot be resolved fails here once, and not in each category.
    normalisation_of(recipe)
    with ExitStack() as leases:
        for store in stores.values():
            leases.enter_context(held(store, wait))
        return _fit_into(categories, recipe, stores, weights, pool)


def _fit_into(
    categories: Sequence[mvtec.Category],
    recipe: Recipe,
    stores: Mapping[int, str],
    weights: StateDict,
    pool: PoolOptions,
) -> list[Outcome]:
    tasks = []
    for seed, store in stores.items():
        digest = ModelStore(store).put_teacher(weights)
        seeded = dataclasses.replace(recipe, seed=seed)
        tasks += [FitTask.of(category, seeded, store, digest) for category in categories]
    outcomes = []
    waiting = []
    with ThreadPoolExecutor(_READERS) as threads:
        found = list(threads.map(_model_or_problem, tasks))
    for task, model in zip(tasks, found, strict=True):
        if isinstance(model, DataError):
            outcomes.append(Outcome.failed(task, str(model)))
            log.info(f"{task.key}: failed: {model}", extra={"category": task.category})
        elif isinstance(model, ModelRecord):
            outcomes.append(Outcome.done(task, model, "reused"))
            line = f"{task.key}: model {model.model_id} is there already, with this recipe and these images"
            log.info(line, extra={"category": task.category})
        else:
            waiting.append(task)
            if model:
                log.info(f"{task.key}: fitted again: {model}", extra={"category": task.category})
    if waiting:
        scratch = storage.join(next(iter(stores.values())), ".train")
        with connected():
            shared = shared_out(pool, working_nodes(), len(tasks))
            outcomes += run_pool(waiting, shared, scratch, _listener(waiting, pool))
    return outcomes


def _model_or_problem(task: FitTask) -> ModelRecord | ModelError | DataError | None:
    """The model that is there already, what is damaged about it, or why there can be none."""
    try:
        task.recipe.check_image_count(len(task.train))
        return existing_model(task)
    except (DataError, ModelError) as error:
        return error


def _listener(tasks: Sequence[FitTask], pool: PoolOptions) -> Callable[[Event], None]:
    tell = FitProgress(tasks, show_progress if is_terminal() else None)
    if not pool.tensorboard:
        return tell
    write = EventFiles(pool.tensorboard, tasks)

    def both(event: Event) -> None:
        write(event)
        tell(event)

    return both


def plan_of(pool: PoolOptions, tasks: int) -> Callable[[Resources], str]:
    """What a node of the connected cluster would fit of so many tasks, in words."""
    return lambda node: planned(pool, working_nodes(), tasks, node)


def warn_of_few_normals(categories: Sequence[mvtec.Category], recipe: Recipe, false_alarm_rate: float) -> None:
    """Say, before they are fitted, which models will not support a false-alarm rate."""
    counts = {
        each.name: NormalCounts(len(each.train), recipe.calibration_count(len(each.train))) for each in categories
    }
    if warning := few_normals_warning(counts, false_alarm_rate):
        log.info(warning)


def read_categories(root: str, wanted: Sequence[str]) -> tuple[list[mvtec.Category], dict[str, str]]:
    """The categories of a data set that can be used, and by name the reason why others cannot.

    Raises:
        DataError: if the data set itself is missing or empty, or a wanted category is not there.
    """
    names = mvtec.find_categories(root, wanted)

    def read(name: str) -> mvtec.Category | DataError:
        try:
            return mvtec.read_category(root, name)
        except DataError as error:
            return error

    with ThreadPoolExecutor(_LISTERS) as pool:
        found = dict(zip(names, pool.map(read, names), strict=True))
    failures = {name: str(result) for name, result in found.items() if isinstance(result, DataError)}
    for name, reason in failures.items():
        log.info(f"{name}: failed: {reason}", extra={"category": name})
    return [result for result in found.values() if isinstance(result, mvtec.Category)], failures
