"""The fit job: fit a model for each category of a data set."""

from __future__ import annotations

import logging
from functools import partial

from stpm import storage
from stpm.cluster.placement import log_plan, on_cluster
from stpm.errors import ConfigError
from stpm.exit_codes import ALL_DONE, exit_code
from stpm.fitting.fit_categories import count_good_images, fit_categories, read_categories
from stpm.fitting.options import FitOptions, WorkerOptions
from stpm.fitting.worker_resources import describe_workers
from stpm.method.calibration import warn_about_few_good_images
from stpm.method.recipe import Recipe
from stpm.models.store import ModelStore
from stpm.options import ClusterOptions, WantedBackend
from stpm.tracking import Tracker

log = logging.getLogger(__name__)


def run_fit(options: FitOptions, recipe: Recipe, workers: WorkerOptions, cluster: ClusterOptions) -> int:
    """Run the fit job; return its exit code: 0 all fitted, 2 some categories failed, 3 no category was fitted.

    Raises:
        ConfigError: if the options cannot be run.
        DataError: if the data set or the table of images cannot be read.
    """
    if options.add_good:
        if cluster.plan:
            raise ConfigError("--plan is given with --add-good, which it cannot describe; leave one of them out")
        return _add_good(options, cluster.backend)
    data, own = storage.absolute(options.data), options.by_category
    tracker = Tracker(options.track, data)
    with on_cluster(cluster, [options.data, options.models]):
        store = storage.output_folder(options.models)
        categories, failures = read_categories(data, options.categories, options.exclude, options.roi, own)
        if cluster.plan:
            log_plan({"fits": partial(describe_workers, workers, len(categories))})
            return ALL_DONE
        warn_about_few_good_images(count_good_images(categories, recipe, own), options.false_alarm_rate)
        results = []
        if categories:
            stores = {recipe.seed: store}
            results = fit_categories(categories, recipe, stores, workers, cluster, options.wait, own)
            tracker.log_fits(results)
    failed = len(failures) + sum(result.record is None for result in results)
    done = len(results) + len(failures) - failed
    log.info(f"{done} of {done + failed} categories are fitted; their models are in {options.models}")
    return exit_code(done, failed)


def _add_good(options: FitOptions, backend: WantedBackend) -> int:
    """Add marked images to the models of their categories; return the exit code, by the images marked as good."""
    # It imports torch, which a fit does while Ray starts.
    from stpm.line.feedback import add_good, read_marks

    store = ModelStore(storage.output_folder(options.models))
    marks = read_marks(options.add_good, options.allow, options.categories)
    done, failed = add_good(store, marks, options.false_alarm_rate, backend, wait=options.wait)
    log.info(f"{done} of {done + failed} images that are marked as good belong to models in {options.models}")
    return exit_code(done, failed)
