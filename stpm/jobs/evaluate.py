"""The evaluate job: make a report from scored, labelled images. The benchmark job ends with the same steps."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter

from stpm import storage
from stpm.cluster.connection import connected
from stpm.cluster.placement import on_cluster
from stpm.errors import DataError, with_remedy
from stpm.evaluation.category import read_models
from stpm.evaluation.evaluate import evaluate_categories, find_labels_without_model, publish_report
from stpm.evaluation.gate import read_gate
from stpm.evaluation.options import EvaluateOptions, ReportOptions
from stpm.evaluation.report import CategoryResult, Failure, Report
from stpm.options import ClusterOptions
from stpm.scoring.output import RunOutput
from stpm.tracking import Tracker

log = logging.getLogger(__name__)


def run_evaluate(options: EvaluateOptions, reporting: ReportOptions, cluster: ClusterOptions) -> int:
    """Run the evaluate job, and return its exit code, see `publish_report`.

    Raises:
        ConfigError: if a requirement or the baseline cannot be read, or some nodes cannot reach the run.
        DataError, ModelError: if the run or one of its models cannot be read, two runs have the same category and seed,
            or no image has a label.
    """
    gate = read_gate(reporting)
    run = storage.absolute(options.run)
    out = storage.output_folder(options.out or run)
    tracker = Tracker(reporting.track, run)
    results: list[CategoryResult] = []
    failures: list[Failure] = []
    # Tasks read the run's rows on any node; only the driver reads models and writes the report.
    cluster = dataclasses.replace(cluster, first_node="cpu")
    with (
        on_cluster(cluster, [run]),
        with_remedy("score its images again: run the benchmark again, or the score job with --fresh"),
    ):
        runs = [(output, *read_models(output, options.models)) for output in RunOutput.find_all(run)]
        counts = Counter((record.category, record.recipe.seed) for _, _, records in runs for record in records)
        for (category, seed), count in counts.items():
            if count > 1:
                # They would be averaged as seeds are.
                raise DataError(
                    f"{run}: {count} runs have scored {category} with seed {seed}; only runs of different seeds can be "
                    "evaluated together"
                )
        with connected():
            for output, store, records in runs:
                results += evaluate_categories(output, records, store, reporting.masks_at)
                failures += find_labels_without_model(output, {record.category for record in records})
    measured = [result.metrics for result in results]
    if (
        results
        and not failures
        and not any(each.good_count + each.defect_count + each.error_count for each in measured)
    ):
        raise DataError(f"{run}: no image has a label; score a table that has the column `label` (docs/evaluation.md)")
    for result in results:
        if unlabelled := result.metrics.unlabelled_count:
            log.info(f"{result.model.category}: {unlabelled} images without a label are not evaluated")
    report = Report(run, results, list(dict.fromkeys(failures)), reporting.masks_at)
    code = publish_report(report, out, gate, reporting.export, [output for output, _, _ in runs])
    tracker.log_report(out)
    return code
