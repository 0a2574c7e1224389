"""Fit all categories of a data set: read them, reuse the models that exist, and fit the others on workers."""

from __future__ import annotations

import dataclasses
import logging
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from threading import Thread

from stpm import storage
from stpm.cluster.connection import connected
from stpm.cluster.device import examine_devices
from stpm.cluster.placement import nodes_for_plan
from stpm.cluster.ray_failures import interrupted_by_ray
from stpm.console import is_terminal, show_progress
from stpm.data import mvtec
from stpm.errors import DataError, ModelDamagedError, ModelUnreadableError, NoModelError
from stpm.fitting.options import CategoryOptions, WorkerOptions
from stpm.fitting.progress import FitProgress
from stpm.fitting.task import FitResult, FitTask
from stpm.lease import hold_lease
from stpm.method.arithmetic import choose_arithmetic
from stpm.method.recipe import Recipe
from stpm.models.record import Decision, ModelRecord
from stpm.models.store import ModelStore
from stpm.models.versions import Version
from stpm.options import ClusterOptions

log = logging.getLogger(__name__)


def read_categories(
    root: str, wanted: Sequence[str], exclude: str = "", roi: str = "", own: Sequence[CategoryOptions] = ()
) -> tuple[list[mvtec.Category], dict[str, str]]:
    """List the images of the wanted categories, or of all; return the usable ones, and by name why others are not.

    Leave out the good images that the file `exclude` lists, if one is given. `roi` is the region of
    interest of each that has none of its `own`.

    Raises:
        DataError: if the data set is missing or empty, or does not have a category that is wanted or has its `own`
            options; or as `mvtec.exclude`.
    """
    names = mvtec.find_categories(root, wanted)
    if own:
        try:
            mvtec.find_categories(root, [each.category for each in own])
        except DataError as error:
            raise DataError(f"categories in {own[0].file}: {error}") from error
    in_lower_case = Counter(map(str.casefold, names))
    rois = {each.category: each.roi for each in own}

    def read(name: str) -> mvtec.Category | DataError | PermissionError:
        if in_lower_case[name.casefold()] > 1:
            # On some disks the folders of their models would be one.
            return DataError("another category's name differs only in case; rename one of them")
        try:
            return mvtec.read_category(root, name, rois.get(name, roi))
        except (DataError, PermissionError) as error:
            return error

    found = dict(zip(names, storage.in_parallel(read, names), strict=True))
    failures = {name: str(result) for name, result in found.items() if isinstance(result, Exception)}
    for name, reason in failures.items():
        log.error(f"{name}: failed: {reason}", extra={"category": name})
    usable = [result for result in found.values() if isinstance(result, mvtec.Category)]
    return mvtec.exclude(usable, exclude) if exclude else usable, failures


def count_good_images(
    categories: Sequence[mvtec.Category], recipe: Recipe, own: Sequence[CategoryOptions] = ()
) -> dict[str, tuple[int, int]]:
    """Count the good images of each category that has enough to fit on, and those that will calibrate its model."""
    counts = [(each, len(category.train)) for category, each in _pair(categories, recipe, own)]
    enough = [(each.category, each.recipe, count) for each, count in counts if count >= each.recipe.min_images]
    return {name: (count, recipe.calibration_count(count)) for name, recipe, count in enough}


def _pair(
    categories: Sequence[mvtec.Category], recipe: Recipe, own: Sequence[CategoryOptions]
) -> list[tuple[mvtec.Category, CategoryOptions]]:
    found = {each.category: each for each in own}
    return [(each, found.get(each.name, CategoryOptions(each.name, recipe))) for each in categories]


def _import_early() -> None:
    # What fails here fails again, and is raised, where the fit imports it; or the process is ending.
    with suppress(Exception):
        import_module("stpm.method.teacher_weights")


def fit_categories(
    categories: Sequence[mvtec.Category],
    recipe: Recipe,
    stores: Mapping[int, str],
    workers: WorkerOptions,
    cluster: ClusterOptions,
    wait: bool,
    own: Sequence[CategoryOptions] = (),
) -> list[FitResult]:
    """Fit one model per category and seed. Reuse undamaged models that the stores already hold.

    Hold a lease on each store meanwhile; if another run holds one, `wait` for its end or raise ConfigError.

    Args:
        categories: with their training images.
        recipe: of all categories without one of their `own`; its seed is not used.
        stores: URI of the model store, by seed.

    Returns:
        One result per category and seed.

    Raises:
        ConfigError: if a teacher or its normalisation is unknown, the workers do not fit the cluster, or OpenVINO is
            wanted and not installed.
        DeviceError: if torch cannot use a GPU that Ray assigns.
        RunInterruptedError: if no node came in time, or Ray failed.
    """
    pairs = _pair(categories, recipe, own)
    with ExitStack() as stack:
        for uri in stores.values():
            stack.enter_context(hold_lease(uri, wait))
        if any({each.name for each in categories} - {*storage.subfolders(uri, links=True)} for uri in stores.values()):
            # A new category needs Ray, which starts in other processes, for seconds: meanwhile this one imports torch.
            Thread(target=_import_early, daemon=True).start()
            stack.enter_context(connected())
        from stpm.fitting.training_images import choose_normalisation
        from stpm.fitting.worker_group import run_worker_group
        from stpm.fitting.worker_resources import choose_worker_resources
        from stpm.method.teacher_weights import load_teacher_weights

        weights = {}
        for each in dict.fromkeys(options.recipe for _, options in pairs):
            if (teacher := _teacher_of(each)) not in weights:
                weights[teacher] = load_teacher_weights(*teacher)
            # Raise the error of an unknown normalisation once, instead of in each category.
            choose_normalisation(each)
        tasks: list[FitTask] = []
        for seed, uri in stores.items():
            store = ModelStore(uri)
            digests = {teacher: store.put_teacher(state) for teacher, state in weights.items()}
            for category, options in pairs:
                digest = digests[_teacher_of(options.recipe)]
                seeded = dataclasses.replace(options.recipe, seed=seed).for_image_count(len(category.train))
                decision = None if options.threshold is None else Decision(options.threshold, options.file)
                regions = category.roi, category.rois
                tasks.append(FitTask(category.name, category.train, seeded, store.uri, digest, *regions, decision))
        planned = storage.in_parallel(_plan, tasks)
        results = [result for result in planned if result]
        unfinished = [task for task, result in zip(tasks, planned, strict=True) if not result]
        if unfinished:
            scratch = storage.join(next(iter(stores.values())), ".train")
            with connected(), interrupted_by_ray("fitting"):
                progress = FitProgress(unfinished, show_progress if is_terminal() else None)
                resources = choose_worker_resources(workers, nodes_for_plan(cluster), len(tasks))
                arithmetic = choose_arithmetic(examine_devices(gpus=resources.gpus > 0), cluster.backend)
                results += run_worker_group(unfinished, workers, resources, arithmetic, scratch, progress)
        return results


def _teacher_of(recipe: Recipe) -> tuple[str, str, tuple[int, ...]]:
    from stpm.method.views import levels_of_teacher

    return recipe.teacher, recipe.teacher_weights, levels_of_teacher(recipe)


def _plan(task: FitTask) -> FitResult | None:
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
            if (wanted := task.decision) and wanted.threshold != (model.decision and model.decision.threshold):
                decided = ("--threshold", f"{task.category}={wanted.threshold:.9g}")
                command = shlex.join(["stpm", "models", "--models", store.uri, *decided])
                _log(task, f"its threshold stays; that of {wanted.by} is for new models. To decide it now: {command}")
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
    if current.decision:
        _log(task, f"a new model begins without the threshold of {current.model_id}: {current.decision}")
    return None


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


def _log(task: FitTask, message: str) -> None:
    log.info(f"{task.key}: {message}", extra={"category": task.category})
