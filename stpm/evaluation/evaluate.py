"""Evaluate the categories of a scored run, each in a Ray task, and publish the report."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import pyarrow.dataset as ds
import ray

from stpm import storage
from stpm.cluster.ray_failures import interrupted_by_ray, results_of
from stpm.console import log_lines
from stpm.data.spreadsheets import remove_tables, write_tables
from stpm.evaluation.category import ScoredCategory, read_scores
from stpm.evaluation.charts import draw_charts
from stpm.evaluation.gallery import galleries
from stpm.evaluation.gate import Gate
from stpm.evaluation.options import MasksAt
from stpm.evaluation.report import CategoryResult, Failure, Report
from stpm.evaluation.thresholds import place_threshold
from stpm.exit_codes import ALL_DONE, SOME_FAILED, exit_code
from stpm.metrics.category_metrics import measure_category
from stpm.metrics.intervals import Scores
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.options import Export
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import check_row_count, read_batches, row_reader

log = logging.getLogger(__name__)


def evaluate_categories(
    output: RunOutput, records: Sequence[ModelRecord], store: ModelStore, masks_at: MasksAt
) -> list[CategoryResult]:
    """Evaluate categories of a run, each in a Ray task.

    Needs a connection to Ray.

    Raises:
        RunDamagedError: if a file of rows is damaged, missing or doubled.
        RunInterruptedError: if a node or Ray failed.
    """
    check_row_count(output)
    remote = ray.remote(evaluate_category)
    given = [(store.history(each).to_pydict(), store.calibration_scores(each)["score"].to_numpy()) for each in records]
    with interrupted_by_ray("evaluation"):
        return results_of(
            [remote.remote(output, record, *values, masks_at) for record, values in zip(records, given, strict=True)]
        )


def find_labels_without_model(output: RunOutput, categories: Collection[str]) -> list[Failure]:
    """Return a failure for each category that has labels but none of the models, which have these categories."""
    batches = read_batches(output, ["category"], ds.field("label") != "")
    counts = Counter(name for batch in batches for name in batch["category"].to_pylist())
    return [
        Failure(name or "(no category)", f"no model scored its {count} images with a label")
        for name, count in sorted(counts.items())
        if name not in categories
    ]


def evaluate_category(
    output: RunOutput,
    record: ModelRecord,
    history: Mapping[str, Sequence[float]],
    calibration: Scores,
    masks_at: MasksAt,
) -> CategoryResult:
    """Measure one category, and draw its charts and pictures.

    Its images are those that a run scored with the model of this record, which has these calibration scores, (n,).
    `history` is as in `draw_charts`.
    """
    category = ScoredCategory(output, record.category, record.preprocessing)
    # First: it finds rows that the pictures cannot be drawn from.
    scores = read_scores(category, masks_at)
    charts = draw_charts(scores, history, record.fit.kept_epoch, salt=category.name)
    threshold = place_threshold(scores.threshold, calibration, record.decision)
    shown = galleries(category, record.heatmap_scale)
    return CategoryResult(record, measure_category(scores), charts, shown, threshold)


def publish_report(
    report: Report, out: str, gate: Gate, export: Export = "none", runs: Sequence[RunOutput] = ()
) -> int:
    """Write the report, and its tables and the rows of its runs for people; print it, and check it against the gate.

    Returns:
        The exit code: 0 all done, 2 something failed or fell short, 3 nothing could be evaluated.
    """
    shortfalls = gate.shortfalls(report.contents)
    files = report.files() | {"report.html": report.page(shortfalls).encode()}
    tables = {name: table.to_reader() for name, table in report.tables().items()}
    # Those of an earlier report would lie beside this one.
    remove_tables(out, [*tables, *(f"rows-{run.name}" for run in {*runs, *RunOutput.all_named(out)})])
    for name, content in files.items():
        storage.publish(storage.join(out, name), content)
    if export != "none":
        write_tables(out, tables | {f"rows-{run.name}": row_reader(run) for run in runs}, export)
    log_lines(report.text())
    for line in shortfalls:
        log.error(f"falls short: {line}")
    log.info(f"the report is {storage.join(out, 'report.html')}, with .json, .parquet and .md beside it")
    code = exit_code(len(report.results), len(report.failures))
    return SOME_FAILED if code == ALL_DONE and shortfalls else code
