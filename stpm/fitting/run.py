"""Fit every category of a data set: plan the tasks, run the pool, tell what happens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from stpm import mvtec, storage
from stpm.calibration import Normals, shortfall
from stpm.cluster import Resources, connected, working_nodes
from stpm.console import ALL_DONE, NOTHING_DONE, Line, Say, exit_code, show, watched
from stpm.errors import DataError, ModelError
from stpm.fitting.event_files import EventFiles
from stpm.fitting.options import FitOptions, PoolOptions
from stpm.fitting.pool import planned, run_pool, shared_out
from stpm.fitting.queue import Event
from stpm.fitting.task import FitTask, Outcome
from stpm.fitting.teller import Teller
from stpm.fitting.training_images import normalisation_of
from stpm.fitting.worker import existing_model
from stpm.lease import held
from stpm.models import ModelStore
from stpm.networks import StateDict, load_teacher
from stpm.options import ClusterOptions
from stpm.placement import on_cluster, say_plan
from stpm.recipe import Recipe
from stpm.record import ModelRecord

_LISTERS = 16
_READERS = 8


def fit_categories(
    categories: Sequence[mvtec.Category],
    recipe: Recipe,
    stores: Mapping[int, str],
    pool: PoolOptions,
    wait: bool,
    say: Say,
) -> list[Outcome]:
    """Fit one model per category and seed, in one pool; what the stores already hold, and is sound, is reused.

    It holds each of the stores meanwhile.

    Args:
        categories: what to fit.
        recipe: how; its seed is replaced by each of the stores'.
        stores: model store by seed.
        pool: the workers.
        wait: for another run that holds a store, instead of refusing.
        say: told of each epoch and outcome, a line each.

    Returns:
        One outcome per category and seed.

    Raises:
        ConfigError: if the teacher or its normalisation cannot be had, the workers do not fit the cluster, or another
            run holds a store.
    """
    weights = load_teacher(recipe.teacher, recipe.teacher_weights, recipe.levels)
    # What cannot be resolved fails here once, and not in each category.
    normalisation_of(recipe)
    with ExitStack() as leases:
        for store in stores.values():
            leases.enter_context(held(store, wait, say))
        return _fit_into(categories, recipe, stores, weights, pool, say)


def _fit_into(
    categories: Sequence[mvtec.Category],
    recipe: Recipe,
    stores: Mapping[int, str],
    weights: StateDict,
    pool: PoolOptions,
    say: Say,
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
            say(Line(f"{task.key}: failed: {model}", task.category))
        elif isinstance(model, ModelRecord):
            outcomes.append(Outcome.done(task, model, "reused"))
            line = f"{task.key}: model {model.model_id} is there already, with this recipe and these images"
            say(Line(line, task.category))
        else:
            waiting.append(task)
            if model:
                say(Line(f"{task.key}: fitted again: {model}", task.category))
    if waiting:
        scratch = storage.join(next(iter(stores.values())), ".train")
        with connected():
            shared = shared_out(pool, working_nodes(), len(tasks))
            outcomes += run_pool(waiting, shared, scratch, _listener(waiting, pool, say))
    return outcomes


def _model_or_problem(task: FitTask) -> ModelRecord | ModelError | DataError | None:
    """The model that is there already, what is damaged about it, or why there can be none."""
    try:
        task.recipe.check_images(len(task.train))
        return existing_model(task)
    except (DataError, ModelError) as error:
        return error


def _listener(tasks: Sequence[FitTask], pool: PoolOptions, say: Say) -> Callable[[Event], None]:
    tell = Teller(tasks, say, show if watched() else None)
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


def warn_of_few_normals(
    categories: Sequence[mvtec.Category], recipe: Recipe, false_alarm_rate: float, say: Say
) -> None:
    """Say, before they are fitted, which models will not support a false-alarm rate."""
    counts = {each.name: Normals(len(each.train), recipe.calibrating(len(each.train))) for each in categories}
    if warning := shortfall(counts, false_alarm_rate):
        say(warning)


def read_categories(root: str, wanted: Sequence[str], say: Say) -> tuple[list[mvtec.Category], dict[str, str]]:
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
        say(Line(f"{name}: failed: {reason}", name))
    return [result for result in found.values() if isinstance(result, mvtec.Category)], failures


def run_fit(options: FitOptions, recipe: Recipe, pool: PoolOptions, cluster: ClusterOptions, say: Say) -> int:
    """The fit job. Returns its exit code: 0 all fitted, 2 some categories failed, 3 none could be fitted.

    Raises:
        ConfigError: if the options cannot be run at all.
    """
    with on_cluster(cluster, [options.data, options.models], say):
        return _fit(options, recipe, pool, cluster.plan, say)


def _fit(options: FitOptions, recipe: Recipe, pool: PoolOptions, plan: bool, say: Say) -> int:
    store = storage.output_folder(options.models)
    try:
        categories, failures = read_categories(storage.absolute(options.data), options.categories, say)
    except DataError as error:
        say(f"error: {error}")
        return NOTHING_DONE
    if plan:
        say_plan({"fits": plan_of(pool, len(categories))}, say)
        return ALL_DONE
    warn_of_few_normals(categories, recipe, options.false_alarm_rate, say)
    outcomes = fit_categories(categories, recipe, {recipe.seed: store}, pool, options.wait, say) if categories else []
    failed = len(failures) + sum(outcome.status == "failed" for outcome in outcomes)
    good = len(outcomes) + len(failures) - failed
    say(f"{good} of {good + failed} categories have a model in {options.models}")
    return exit_code(good, failed)
