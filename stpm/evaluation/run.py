"""From scored, labelled images to a report: what the benchmark ends with, and the evaluate job on its own."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from stpm import storage
from stpm.cluster import connected
from stpm.console import NOTHING_DONE, SOME_FAILED, Say, exit_code
from stpm.errors import DataError, ModelError
from stpm.evaluation.category import Figures, evaluate
from stpm.evaluation.gallery import Tile, galleries, sheet
from stpm.evaluation.gate import Gate
from stpm.evaluation.options import EvaluateOptions, EvaluationOptions, GateOptions, MasksAt
from stpm.evaluation.page import write_page
from stpm.evaluation.report import Failure, Report, Result
from stpm.models import ModelStore
from stpm.record import ModelRecord
from stpm.scoring.ledger import Ledger
from stpm.scoring.target import Target


def evaluate_pass(
    target: Target, records: Sequence[ModelRecord], store: ModelStore, options: EvaluationOptions
) -> list[Result]:
    """The results of some categories of one pass, in Ray tasks next to the maps. Needs a connection to Ray."""
    remote = ray.remote(_evaluate)
    found = ray.get([remote.remote(target, record, options.masks_at) for record in records])
    return [
        Result(record, figures, store.history(record).to_pydict(), tiles)
        for record, (figures, tiles) in zip(records, found, strict=True)
    ]


def _evaluate(target: Target, record: ModelRecord, masks_at: MasksAt) -> tuple[Figures, dict[str, list[Tile]]]:
    figures = evaluate(target, record.category, record.preprocessing, masks_at)
    if picture := sheet(target, record.category, record.preprocessing):
        storage.publish(storage.join(target.out, "gallery", target.name, f"{record.category}.png"), picture)
    return figures, galleries(target, record.category, record.preprocessing)


def conclude(report: Report, out: str, gate: Gate, say: Say) -> int:
    """Write the report, say it, hold it against the gate.

    Returns:
        The exit code: 2 if something failed or fell short.
    """
    shortfalls = gate.shortfalls(report.as_json())
    report.write(out)
    write_page(report, out, shortfalls)
    say(f"\n{report.as_text()}\n")
    for line in shortfalls:
        say(f"falls short: {line}")
    say(f"the report is {storage.join(out, 'report.html')}, with .json, .parquet and .md beside it")
    code = exit_code(len(report.results), len(report.failures))
    return code or (SOME_FAILED if shortfalls else code)


def run_evaluate(options: EvaluateOptions, evaluation: EvaluationOptions, gate: GateOptions, say: Say) -> int:
    """The evaluate job. Returns its exit code: 0 all evaluated, 2 something failed or fell short, 3 nothing could be.

    Raises:
        ConfigError: if the baseline cannot be read.
    """
    requirements = Gate.of(gate)
    run = storage.absolute(options.scores)
    out = storage.output_folder(options.out or run)
    results: list[Result] = []
    try:
        passes = [(target, *_models(target, options.models)) for target in Target.found(run)]
        with connected():
            for target, store, records in passes:
                results += evaluate_pass(target, records, store, evaluation)
    except (DataError, ModelError) as error:
        say(f"error: {error}")
        return NOTHING_DONE
    for result in results:
        if result.figures.unlabelled_count:
            say(f"{result.model.category}: {result.figures.unlabelled_count} images without a label are left out")
    report = Report(run, results, problems_of(results), evaluation.masks_at)
    return conclude(report, out, requirements, say)


def _models(target: Target, elsewhere: str) -> tuple[ModelStore, list[ModelRecord]]:
    """The models that made a pass, from where they were, or from elsewhere.

    Raises:
        DataError: if the pass has not come so far.
        ModelError: if one of them is no longer there.
    """
    uri, made_by = Ledger(target.home).models()
    store = ModelStore(elsewhere or uri)
    return store, [store.record(category, model_id) for category, model_id in made_by.items()]


def problems_of(results: Sequence[Result]) -> list[Failure]:
    """What went wrong with images, as failures of their category."""
    return [Failure(result.model.category, problem) for result in results for problem in result.figures.problems]
