"""The benchmark job: fit all, score each test split through the same pipeline, evaluate, report."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import partial

from stpm import storage
from stpm.cluster.connection import connected
from stpm.cluster.placement import log_plan, on_cluster
from stpm.console import ALL_DONE, NOTHING_DONE
from stpm.data import demo, mvtec
from stpm.data.mvtec import Category
from stpm.errors import CutOffError, DataError
from stpm.evaluation.gate import Gate, read_gate
from stpm.evaluation.options import EvaluationOptions, GateOptions
from stpm.evaluation.report import CategoryResult, Failure, Report
from stpm.fitting.fit_categories import fit_categories, plan_fits, read_categories, warn_about_few_normals
from stpm.fitting.options import WorkerOptions
from stpm.jobs.benchmark_options import BenchmarkOptions
from stpm.jobs.evaluate import evaluate_categories, publish_report
from stpm.lease import held
from stpm.method.recipe import Recipe
from stpm.models.store import ModelStore
from stpm.options import ClusterOptions
from stpm.scoring.inputs.manifest import of_test_images
from stpm.scoring.options import ScoreOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.pipeline import planned
from stpm.scoring.resuming.run_state import RunConfig
from stpm.scoring.run import ScoringRun, run_scoring

log = logging.getLogger(__name__)


def run_benchmark(
    options: BenchmarkOptions,
    recipe: Recipe,
    pool: WorkerOptions,
    scoring: ScoreOptions,
    evaluation: EvaluationOptions,
    gate: GateOptions,
    cluster: ClusterOptions,
) -> int:
    """The benchmark job. Returns its exit code: 0 all done, 2 something failed or fell short, 3 nothing could be done.

    Raises:
        StpmError: if it cannot be run at all.
    """
    requirements = read_gate(gate)
    out = storage.output_folder(options.out)
    data = storage.absolute(options.data) if options.data else storage.join(out, "demo-data")
    with on_cluster(cluster, [data, out]):
        if cluster.plan:
            names = mvtec.find_categories(data, options.categories) if options.data else list(demo.TEXTURES)
            tasks = len(names) * len(options.seeds)
            log_plan({"fits": partial(plan_fits, pool, tasks), "then scores": partial(planned, scoring)})
            return ALL_DONE
        with held(out, options.wait):
            if not options.data:
                demo.make(data)
            return _run(options, data, out, recipe, pool, scoring, evaluation, requirements, cluster)


def _run(
    options: BenchmarkOptions,
    data: str,
    out: str,
    recipe: Recipe,
    pool: WorkerOptions,
    scoring: ScoreOptions,
    evaluation: EvaluationOptions,
    requirements: Gate,
    cluster: ClusterOptions,
) -> int:
    try:
        categories, unreadable = read_categories(data, options.categories)
    except DataError as error:
        log.info(f"error: {error}")
        return NOTHING_DONE
    failures = [Failure(name, reason) for name, reason in unreadable.items()]
    results: list[CategoryResult] = []
    if categories:
        with connected():
            stores = {seed: storage.join(out, "models", f"seed-{seed}") for seed in options.seeds}
            warn_about_few_normals(categories, recipe, scoring.false_alarm_rate)
            fits = fit_categories(categories, recipe, stores, pool, cluster.backend, options.wait)
            failures += [Failure(fit.task.key, fit.reason) for fit in fits if not fit.record]
            for seed, store in stores.items():
                records = [fit.record for fit in fits if fit.task.recipe.seed == seed and fit.record]
                if records:
                    log.info(f"seed {seed}: scoring the test images of {len(records)} categories")
                    fitted = [c for c in categories if c.name in {record.category for record in records}]
                    output = RunOutput.among(out, f"seed-{seed}")
                    _score(data, fitted, ModelStore(store), scoring, output)
                    results += evaluate_categories(output, records, ModelStore(store), evaluation)
    code = publish_report(Report(data, results, failures, evaluation.masks_at), out, requirements)
    log.info(f"models, scores and heatmaps are in {out}")
    return code


def _score(
    data: str, categories: Sequence[Category], store: ModelStore, options: ScoreOptions, output: RunOutput
) -> None:
    """Score the test images, those of an earlier run left as they are where nothing differs.

    Raises:
        CutOffError: if some are left: figures of a part would not be those of the test split.
    """
    if not any(category.test for category in categories):
        output.clear()
        return
    digest = hashlib.sha256(repr([category.test for category in categories]).encode()).hexdigest()
    config = RunConfig((data,), options.false_alarm_rate, output.heatmaps, output.raw_maps, manifest=digest)
    of = ScoringRun(lambda: of_test_images(categories), config, store, options, output)
    counts = run_scoring(of, start_over=False, replace=True)
    if counts.left:
        raise CutOffError(f"{counts.left} test images are not scored; run the same command again to go on")
