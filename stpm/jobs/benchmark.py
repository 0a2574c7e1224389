"""The benchmark job: fit all categories, score their test images, evaluate, and report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from stpm.lease import Fence, hold_lease
from stpm.method.calibration import warn_about_few_good_images
from stpm.method.recipe import Recipe
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.options import ClusterOptions
from stpm.scoring.inputs.manifest import labelled_rows
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
        with hold_lease(out, options.wait) as fence:
            if not options.data:
                demo.make(data)
            categories, unreadable = read_categories(data, options.categories)
            failures = [Failure(name, reason) for name, reason in unreadable.items()]
            results: list[CategoryResult] = []
            if categories:
                split = _TestSplit(data, categories, scoring, reporting.masks_at, cluster)
                results, failed_fits = _fit_and_test(split, out, fence, options, recipe, workers)
                failures += failed_fits
            code = publish_report(Report(data, results, failures, reporting.masks_at), out, gate)
            log.info(f"models, scores and heatmaps are in {out}")
            return code


@dataclass(frozen=True)
class _TestSplit:
    """The test images of the categories, and how to score and evaluate them.

    Args:
        data: URI of the data set.
        categories: of the data set.
        options: how to score.
        masks_at: the size at which masks and anomaly maps are compared.
        cluster: what computes, and how to use a cluster.
    """

    data: str
    categories: Sequence[Category]
    options: ScoreOptions
    masks_at: MasksAt
    cluster: ClusterOptions

    def score(self, records: Sequence[ModelRecord], store: ModelStore, output: RunOutput) -> None:
        """Score the categories of these models; rows of an earlier run with the same configuration are kept.

        Raises:
            CutOffError: if images are unfinished: metrics of a part would not be those of the test split.
        """
        log.info(f"{output.name}: scoring the test images of {len(records)} categories")
        fitted = {record.category for record in records}
        tested = [category for category in self.categories if category.name in fitted]
        if not any(category.test for category in tested):
            output.clear()
            return
        digest = storage.digest(repr([category.test for category in tested]).encode())
        # Metrics of pixels are computed from the maps.
        kept = OutputOptions(raw_maps=True)
        config = ScoringConfig((self.data,), self.options.false_alarm_rate, kept, manifest=digest)
        rows = partial(labelled_rows, tested)
        run = ScoringRun(rows, config, store, self.options, output, cluster=self.cluster)
        result, _ = run_scoring(run, replace=True)
        if result.unfinished:
            raise CutOffError(f"{result.unfinished} test images are not scored; run the same command again to go on")

    def evaluate(self, records: Sequence[ModelRecord], store: ModelStore, output: RunOutput) -> list[CategoryResult]:
        """Evaluate the categories of these models; see `evaluate_categories`."""
        return evaluate_categories(output, records, store, self.masks_at, output.folder)


def _fit_and_test(
    split: _TestSplit, out: str, fence: Fence, options: BenchmarkOptions, recipe: Recipe, workers: WorkerOptions
) -> tuple[list[CategoryResult], list[Failure]]:
    """Fit all categories with each seed; score and evaluate their test images. Return the fits that failed, too."""
    stores = {seed: storage.join(out, "models", f"seed-{seed}") for seed in options.seeds}
    results: list[CategoryResult] = []
    with connected():
        warn_about_few_good_images(count_good_images(split.categories, recipe), split.options.false_alarm_rate)
        fits = fit_categories(split.categories, recipe, stores, workers, split.cluster, options.wait)
        for seed, uri in stores.items():
            if records := [fit.record for fit in fits if fit.task.recipe.seed == seed and fit.record]:
                output = RunOutput.named(out, f"seed-{seed}", fence)
                arguments = records, ModelStore(uri), output
                results += _score_and_evaluate(
                    output, partial(split.score, *arguments), partial(split.evaluate, *arguments)
                )
    return results, [Failure(fit.task.key, fit.reason) for fit in fits if not fit.record]


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
