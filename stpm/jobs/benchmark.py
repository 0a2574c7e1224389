"""The benchmark job: fit all categories, score their test images, evaluate, and report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from stpm import storage
from stpm.cluster.connection import connected
from stpm.cluster.placement import on_cluster
from stpm.cluster.plan import log_plan
from stpm.console import ALL_DONE
from stpm.data import demo, mvtec
from stpm.data.mvtec import Category
from stpm.errors import CutOffError, RunDamagedError, with_remedy
from stpm.evaluation.evaluate import evaluate_categories, publish_report
from stpm.evaluation.gate import read_gate
from stpm.evaluation.options import MasksAt, ReportOptions
from stpm.evaluation.report import CategoryResult, Failure, Report
from stpm.fitting.fit_categories import count_good_images, fit_categories, read_categories
from stpm.fitting.options import WorkerOptions
from stpm.fitting.worker_resources import describe_workers
from stpm.jobs.benchmark_options import BenchmarkOptions
from stpm.lease import hold_lease
from stpm.method.calibration import warn_about_few_good_images
from stpm.method.recipe import Recipe
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.options import ClusterOptions, WantedBackend
from stpm.scoring.inputs.manifest_rows import labelled_rows
from stpm.scoring.options import OutputOptions, ScoreOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.run import run_scoring
from stpm.scoring.run_state import ScoringConfig
from stpm.scoring.scorer_pool import describe_plan
from stpm.scoring.scoring_run import ScoringRun

log = logging.getLogger(__name__)


def run_benchmark(
    options: BenchmarkOptions,
    recipe: Recipe,
    workers: WorkerOptions,
    scoring: ScoreOptions,
    reporting: ReportOptions,
    cluster: ClusterOptions,
) -> int:
    """Run the benchmark job.

    Returns:
        The exit code: 0 all done, 2 something failed or fell short of a requirement, 3 nothing could be done.

    Raises:
        StpmError: if the job cannot be run at all.
    """
    gate = read_gate(reporting)
    out = storage.output_folder(options.out)
    data = storage.absolute(options.data) if options.data else storage.join(out, "demo-data")
    with on_cluster(cluster, [data, out]):
        if cluster.plan:
            names = mvtec.find_categories(data, options.categories) if options.data else list(demo.TEXTURES)
            tasks = len(names) * len(options.seeds)
            log_plan(
                {"fits": partial(describe_workers, workers, tasks), "then scores": partial(describe_plan, scoring)}
            )
            return ALL_DONE
        with hold_lease(out, options.wait):
            if not options.data:
                demo.make(data)
            categories, unreadable = read_categories(data, options.categories)
            failures = [Failure(name, reason) for name, reason in unreadable.items()]
            results: list[CategoryResult] = []
            if categories:
                results, failed_fits = _fit_score_and_evaluate(
                    data, categories, out, options, recipe, workers, scoring, reporting.masks_at, cluster.backend
                )
                failures += failed_fits
            code = publish_report(Report(data, results, failures, reporting.masks_at), out, gate)
            log.info(f"models, scores and heatmaps are in {out}")
            return code


def _fit_score_and_evaluate(
    data: str,
    categories: Sequence[Category],
    out: str,
    options: BenchmarkOptions,
    recipe: Recipe,
    workers: WorkerOptions,
    scoring: ScoreOptions,
    masks_at: MasksAt,
    backend: WantedBackend,
) -> tuple[list[CategoryResult], list[Failure]]:
    """Fit all categories with each seed; score and evaluate their test images. Return the fits that failed, too."""
    stores = {seed: storage.join(out, "models", f"seed-{seed}") for seed in options.seeds}
    results: list[CategoryResult] = []
    with connected():
        warn_about_few_good_images(count_good_images(categories, recipe), scoring.false_alarm_rate)
        fits = fit_categories(categories, recipe, stores, workers, backend, options.wait)
        for seed, uri in stores.items():
            records = [fit.record for fit in fits if fit.task.recipe.seed == seed and fit.record]
            if records:
                output = RunOutput.named(out, f"seed-{seed}")
                results += _run_seed(data, categories, records, ModelStore(uri), scoring, output, masks_at, backend)
    return results, [Failure(fit.task.key, fit.reason) for fit in fits if not fit.record]


def _run_seed(
    data: str,
    categories: Sequence[Category],
    records: Sequence[ModelRecord],
    store: ModelStore,
    scoring: ScoreOptions,
    output: RunOutput,
    masks_at: MasksAt,
    backend: WantedBackend,
) -> list[CategoryResult]:
    """Score and evaluate the test images with the models of one seed; see `_score_and_evaluate`."""

    def score() -> None:
        _score(data, categories, records, store, scoring, output, backend)

    def evaluate() -> list[CategoryResult]:
        return evaluate_categories(output, records, store, masks_at)

    return _score_and_evaluate(output, score, evaluate)


def _score_and_evaluate(
    output: RunOutput, score: Callable[[], None], evaluate: Callable[[], list[CategoryResult]]
) -> list[CategoryResult]:
    """Score and evaluate a run. If its files are damaged, start it over, once: its rows can always be made again.

    Raises:
        OtherRunError: if a file in its place is no run's.
        RunDamagedError: if files of the new run are damaged, too.
    """
    files = f"{output.state_folder}, {output.heatmaps} and {output.scores}/{output.name}_*"
    with with_remedy(f"remove {files}, or give another --out"):
        try:
            score()
            return evaluate()
        except RunDamagedError as error:
            log.warning(f"{error}; {output.name} is scored again")
            output.clear()
            score()
            return evaluate()


def _score(
    data: str,
    categories: Sequence[Category],
    records: Sequence[ModelRecord],
    store: ModelStore,
    options: ScoreOptions,
    output: RunOutput,
    backend: WantedBackend,
) -> None:
    """Score the test images of the fitted categories; rows of an earlier run with the same configuration are kept.

    Raises:
        CutOffError: if images are unfinished: metrics of a part would not be those of the test split.
    """
    log.info(f"{output.name}: scoring the test images of {len(records)} categories")
    fitted = {record.category for record in records}
    tested = [category for category in categories if category.name in fitted]
    if not any(category.test for category in tested):
        output.clear()
        return
    digest = storage.digest(repr([category.test for category in tested]).encode())
    # Metrics of pixels are computed from the maps.
    config = ScoringConfig((data,), options.false_alarm_rate, OutputOptions(raw_maps=True), manifest=digest)
    run = ScoringRun(partial(labelled_rows, tested), config, store, options, output, backend=backend)
    result, _ = run_scoring(run, replace=True)
    if result.unfinished:
        raise CutOffError(f"{result.unfinished} test images are not scored; run the same command again to go on")
