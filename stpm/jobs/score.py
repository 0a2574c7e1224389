"""The score job: score a collection of images."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import IO

import pyarrow as pa

from stpm import storage
from stpm.cluster.placement import log_plan, on_cluster
from stpm.errors import with_remedy
from stpm.exit_codes import ALL_DONE, NOTHING_DONE, SOME_FAILED
from stpm.lease import hold_lease
from stpm.method.calibration import warn_about_few_good_images
from stpm.models.store import ModelStore
from stpm.options import ClusterOptions
from stpm.scoring.dry_run import dry_run
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.sources import STANDARD_INPUT, image_rows, stored_list
from stpm.scoring.options import CollectionOptions, OutputOptions, ScoreOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.run import run_scoring
from stpm.scoring.run_state import ScoringConfig
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
    sources = tuple(s if s == STANDARD_INPUT else storage.absolute(s) for s in collection.images)
    uris = [collection.models, folder, *collection.allow, *(s for s in sources if s != STANDARD_INPUT)]
    with on_cluster(cluster, uris):
        if cluster.plan:
            log_plan({"scores": partial(describe_plan, scoring)})
            return ALL_DONE
        # A dry run writes to a folder of its own.
        lease = nullcontext() if collection.dry_run else hold_lease(folder, collection.wait)
        with lease as fence, stored_list(sys.stdin if STANDARD_INPUT in sources else ()) as (lines, digest):
            config = ScoringConfig(
                images=sources,
                false_alarm_rate=scoring.false_alarm_rate,
                region_rate=scoring.region_rate,
                output=output,
                category=collection.category,
                category_from=collection.category_from,
                allow=tuple(collection.allow),
                standard_input=digest,
            )
            run = ScoringRun(
                rows=partial(_manifest_rows, config, lines),
                config=config,
                store=ModelStore(collection.models),
                options=scoring,
                output=RunOutput.single(folder, fence),
                triage_images=collection.top,
                cluster=cluster,
                fdr=collection.fdr,
                coco=collection.coco,
            )
            if collection.dry_run:
                dry_run(run)
                return ALL_DONE
            with with_remedy("give another --out, or --fresh, which removes the rows and starts over"):
                result, models = run_scoring(run, start_over=collection.fresh)
    if result.unfinished:
        return SOME_FAILED
    counts = {name: (each.good_count, each.fit.calibration_count) for name, each in models.items() if not each.decision}
    warn_about_few_good_images(counts, scoring.false_alarm_rate)
    _log_result(result, run.output)
    if result.rows and result.error_count == result.rows:
        return NOTHING_DONE
    if reason := too_many_errors(result.error_count, result.rows, collection.max_error_rate):
        log.error(reason)
        return SOME_FAILED
    return ALL_DONE


def _manifest_rows(config: ScoringConfig, lines: IO[str]) -> Iterator[pa.Table]:
    lines.seek(0)
    return image_rows(config.images, CategoryRule(config.category, config.category_from), config.allow, lines)


def _log_result(result: RunResult, output: RunOutput) -> None:
    for example in result.error_examples:
        log.info(example)
    kinds = ", ".join(f"{number} {kind}" for kind, number in result.errors.items())
    log.info(
        f"{result.rows} rows in {output.scores}: {result.anomalous} anomalous, {result.error_count} with an error"
        f"{f' ({kinds})' if kinds else ''}"
    )
    if found := result.discoveries:
        log.info(found.describe())
        if warning := found.warning():
            log.warning(warning)
