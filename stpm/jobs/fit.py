"""Fit a model per category of a data set: the fit job."""

from __future__ import annotations

import logging

from stpm import storage
from stpm.cluster.placement import log_plan, on_cluster
from stpm.console import ALL_DONE, NOTHING_DONE, exit_code
from stpm.errors import DataError
from stpm.fitting.fit_categories import fit_categories, plan_of, read_categories, warn_of_few_normals
from stpm.fitting.options import FitOptions, PoolOptions
from stpm.method.recipe import Recipe
from stpm.options import ClusterOptions

log = logging.getLogger(__name__)


def run_fit(options: FitOptions, recipe: Recipe, pool: PoolOptions, cluster: ClusterOptions) -> int:
    """The fit job. Returns its exit code: 0 all fitted, 2 some categories failed, 3 none could be fitted.

    Raises:
        ConfigError: if the options cannot be run at all.
    """
    with on_cluster(cluster, [options.data, options.models]):
        return _fit(options, recipe, pool, cluster.plan)


def _fit(options: FitOptions, recipe: Recipe, pool: PoolOptions, plan: bool) -> int:
    store = storage.output_folder(options.models)
    try:
        categories, failures = read_categories(storage.absolute(options.data), options.categories)
    except DataError as error:
        log.info(f"error: {error}")
        return NOTHING_DONE
    if plan:
        log_plan({"fits": plan_of(pool, len(categories))})
        return ALL_DONE
    warn_of_few_normals(categories, recipe, options.false_alarm_rate)
    outcomes = fit_categories(categories, recipe, {recipe.seed: store}, pool, options.wait) if categories else []
    failed = len(failures) + sum(outcome.status == "failed" for outcome in outcomes)
    good = len(outcomes) + len(failures) - failed
    log.info(f"{good} of {good + failed} categories have a model in {options.models}")
    return exit_code(good, failed)
