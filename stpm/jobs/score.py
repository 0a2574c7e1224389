"""The score job: score a collection of images."""

from __future__ import annotations

import logging
from functools import partial

from stpm import storage
from stpm.cluster.placement import log_plan, on_cluster
from stpm.data.spreadsheets import write_tables
from stpm.errors import with_remedy
from stpm.exit_codes import ALL_DONE, NOTHING_DONE, SOME_FAILED
from stpm.lease import hold_lease
from stpm.options import ClusterOptions
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.sources import image_rows
from stpm.scoring.options import CollectionOptions, OutputOptions, ScoreOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import row_reader
from stpm.scoring.run import run_scoring
from stpm.scoring.run_statistics import RunResult, too_many_errors
from stpm.scoring.scorer_pool import describe_plan
from stpm.scoring.scoring_run import ScoringRun

log = logging.getLogger(__name__)


def run_score(
    collection: CollectionOptions, output: OutputOptions, scoring: ScoreOptions, cluster: ClusterOptions
) -> int:
    """Run the score job.

    Returns:
        The exit code: 0 all scored, 2 images are unfinished or too many are errors, 3 no image could be scored.

    Raises:
        ConfigError: if the options are invalid, or the run folder holds another run or is in use.
        DataError, ModelError: if the images or the models cannot be read.
    """
    folder = storage.output_folder(collection.out)
    sources = tuple(map(storage.absolute, collection.images))
    with on_cluster(cluster, [collection.models, folder, *collection.allow, *sources]):
        if cluster.plan:
            log_plan({"scores": partial(describe_plan, scoring)})
            return ALL_DONE
        with hold_lease(folder, collection.wait) as fence:
            rule = CategoryRule(collection.category, collection.category_from)
            rows = partial(image_rows, sources, rule, collection.allow)
            written = RunOutput.single(folder, fence)
            run = ScoringRun.of_collection(collection, sources, rows, output, scoring, cluster, written)
            with with_remedy("give another --out, or --fresh, which removes the rows and starts over"):
                result, models = run_scoring(run, start_over=collection.fresh)
            if collection.export != "none" and not result.unfinished:
                write_tables(folder, {"rows": row_reader(written)}, collection.export)
    if result.unfinished:
        return SOME_FAILED
    run.warn_about_few_good_images(models)
    _log_result(result, written)
    if result.rows and result.error_count == result.rows:
        return NOTHING_DONE
    if reason := too_many_errors(result.error_count, result.rows, collection.max_error_rate):
        log.error(reason)
        return SOME_FAILED
    return ALL_DONE


def _log_result(result: RunResult, output: RunOutput) -> None:
    for example in result.error_examples:
        log.info(example)
    kinds = ", ".join(f"{number} {kind}" for kind, number in result.errors.items())
    log.info(
        f"{result.rows} rows in {output.scores}: {result.anomalous} anomalous, {result.error_count} with an error"
        f"{f' ({kinds})' if kinds else ''}"
    )
