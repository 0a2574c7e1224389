"""The benchmark job: fit all categories, score their test images, evaluate, and report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from stpm import storage
from stpm.cluster.connection import connected
from stpm.cluster.placement import log_plan, on_cluster
from stpm.data import demo, mvtec
from stpm.data.mvtec import Category
from stpm.errors import HOW_TO_CONTINUE, RunDamagedError, RunInterruptedError, with_remedy
from stpm.evaluation.evaluate import evaluate_categories, publish_report
from stpm.evaluation.gate import read_gate
from stpm.evaluation.options import BenchmarkOptions, MasksAt, ReportOptions
from stpm.evaluation.report import CategoryResult, Failure, Report
from stpm.exit_codes import ALL_DONE
from stpm.fitting.fit_categories import count_good_images, fit_categories, read_categories
from stpm.fitting.options import WorkerOptions
from stpm.fitting.worker_resources import describe_workers
from stpm.lease import hold_lease
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
from stpm.tracking import Tracker

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
    tracker, own = Tracker(reporting.track, data), options.by_category
    with on_cluster(cluster, [data, out]):
        if cluster.plan:
            names = mvtec.find_categories(data, options.categories) if options.data else list(demo.TEXTURES)
            fitting = partial(describe_workers, workers, len(names) * len(options.seeds))
            log_plan({"fits": fitting, "then scores": partial(describe_plan, scoring)})
            return ALL_DONE
        with hold_lease(out, options.wait) as fence:
            if not options.data:
                demo.make(data)
            categories, unreadable = read_categories(data, options.categories, options.exclude, options.roi, own)
            failures = [Failure(name, reason) for name, reason in unreadable.items()]
            results: list[CategoryResult] = []
            runs: list[RunOutput] = []
            if categories:
                stores = {seed: storage.join(out, "models", f"seed-{seed}") for seed in options.seeds}
                test = TestSplit(data, categories, scoring, reporting.masks_at, cluster)
                with connected():
                    good_images = count_good_images(categories, recipe, own)
                    warn_about_few_good_images(good_images, scoring.false_alarm_rate)
                    fits = fit_categories(categories, recipe, stores, workers, cluster, options.wait, own)
                    tracker.log_fits(fits)
                    failures += [Failure(fit.task.key, fit.reason) for fit in fits if not fit.record]
                    for seed, uri in stores.items():
                        if records := [fit.record for fit in fits if fit.task.recipe.seed == seed and fit.record]:
                            output = RunOutput.named(out, f"seed-{seed}", fence)
                            results += test.results(records, ModelStore(uri), output)
                            runs.append(output)
            report = Report(data, results, failures, reporting.masks_at)
            code = publish_report(report, out, gate, reporting.export, runs)
            tracker.log_report(out)
            log.info(f"models, scores and heatmaps are in {out}")
            return code


@dataclass(frozen=True)
class TestSplit:
    """The test images of a data set's categories, and how to score and evaluate them."""

    data: str
    categories: Sequence[Category]
    options: ScoreOptions
    masks_at: MasksAt
    cluster: ClusterOptions

    def results(self, records: Sequence[ModelRecord], store: ModelStore, output: RunOutput) -> list[CategoryResult]:
        """Score and evaluate the categories of these models. If the run's files are damaged, start it over, once.

        Raises:
            OtherRunError: if a file in its place is no run's.
            RunDamagedError: if files of the new run are damaged, too.
        """
        files = f"{output.state_folder}, {output.heatmaps} and {output.scores}/{output.name}_*"
        with with_remedy(f"remove {files}, or give another --out"):
            try:
                self.score(records, store, output)
                return evaluate_categories(output, records, store, self.masks_at)
            except RunDamagedError as error:
                log.warning(f"{error}; {output.name} is scored again")
                output.clear()
                self.score(records, store, output)
                return evaluate_categories(output, records, store, self.masks_at)

    def score(self, records: Sequence[ModelRecord], store: ModelStore, output: RunOutput) -> None:
        """Score the categories of these models; rows of an earlier run with the same configuration are kept.

        Raises:
            RunInterruptedError: if images are unfinished: metrics of a part would not be those of the test split.
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
        config = ScoringConfig(
            (self.data,), self.options.false_alarm_rate, kept, self.options.region_rate, manifest=digest
        )
        rows = partial(labelled_rows, tested)
        run = ScoringRun(rows, config, store, self.options, output, cluster=self.cluster)
        result, _ = run_scoring(run, replace=True)
        if result.unfinished:
            raise RunInterruptedError(f"{result.unfinished} test images are not scored; {HOW_TO_CONTINUE}")
