"""One run of scoring: write the manifest first, then each row once, and `_SUCCESS` last, whatever is killed."""

from __future__ import annotations

import dataclasses
import logging
import time
from contextlib import suppress
from itertools import chain

from stpm import storage
from stpm.cluster.connection import connected
from stpm.cluster.ray_failures import interrupted_by_ray, is_ray_failure
from stpm.errors import RunDamagedError
from stpm.scoring.coco import write_coco
from stpm.scoring.inputs.manifest import Manifest, read_shard
from stpm.scoring.pipeline import score_shards
from stpm.scoring.progress import Snapshot, show_scoring_progress
from stpm.scoring.resume import resume_or_start
from stpm.scoring.row_summary import RowSummary
from stpm.scoring.run_state import RunState
from stpm.scoring.run_statistics import RunResult
from stpm.scoring.scoring_run import ModelRecords, ScoringRun
from stpm.scoring.triage import write_triage
from stpm.scoring.written_rows import (
    finish_segment,
    remove_leftovers,
    take_over,
    total_of_finished,
    unwritten_shards,
)

log = logging.getLogger(__name__)


def run_scoring(run: ScoringRun, *, start_over: bool = False, replace: bool = False) -> tuple[RunResult, ModelRecords]:
    """Score all images that have no row yet, on Ray. Once all have one, write the triage page.

    Args:
        start_over: remove what earlier runs wrote.
        replace: start over if the output holds a run with another configuration or other models, instead of refusing.

    Returns:
        The result of the run, which is finished unless images are unfinished; and the models.

    Raises:
        OtherRunError: if the output holds another run.
        RunDamagedError: if files of the run are missing or damaged.
        ConfigError: if the output holds files that no run wrote, or the scorers do not fit the cluster.
        DataError: if the sources cannot be read.
        ModelError: if no image's category has a model, or storage failed while a model was read.
        DeviceError: if torch cannot use a GPU that Ray assigns.
        RunInterruptedError: if storage, a node or Ray failed.
    """
    state, manifest, models = resume_or_start(run, start_over=start_over, replace=replace)
    finished = state.result() if state.is_finished() else None
    attempt = state.record.attempt if finished else state.next_attempt()
    run = dataclasses.replace(run, output=run.output.with_attempt(attempt))
    if finished:
        log.info(
            f"all images of this run are scored already; its result is in {state.uri}. Files that came after it began "
            "are not in it"
        )
    scored = finished or _score_remaining(run, state, manifest, models)
    if scored.unfinished:
        return scored, models
    # Raise if summaries are missing: then it is not known which rows count.
    total = total_of_finished(run.output, scored.rows)
    remove_leftovers(run.output, total.tasks)
    if run.triage_images and run.triage_images != state.record.triage_images:
        write_triage(run.output, run.triage_images, models)
        state.write(dataclasses.replace(state.record, triage_images=run.triage_images))
    if run.coco:
        write_coco(run.output, models)
    if not finished:
        state.finish(scored)
    return scored, models


def _score_remaining(run: ScoringRun, state: RunState, manifest: Manifest, models: ModelRecords) -> RunResult:
    """Score the images without a row, segment by segment, and add up the summaries of all rows."""
    start = time.perf_counter()
    with connected(), interrupted_by_ray("scoring"):
        total, progress = _score_segments(run, state, manifest, models)
    # Killed processes leave unfinished files, in this run too: Ray repeats their tasks. Only local folders are listed.
    for folder in (run.output.heatmaps, run.output.scores):
        storage.remove_unfinished(folder)
    missing = manifest.rows - total.rows
    if missing and not progress.unfinished:
        raise RunDamagedError(f"{total.rows} rows in {run.output.scores} for {manifest.rows} images")
    if missing:
        for image in progress.unfinished:
            log.error(str(image))
        log.error(
            f"{missing} images are unfinished, because storage, a model or a device failed: run the same command again "
            "to try them again, or with --accept-errors to write such errors as rows"
        )
    return RunResult(
        *(total.rows, total.anomalous, total.errors, total.error_examples, total.categories, total.bytes_read),
        unfinished=missing,
        seconds=round(time.perf_counter() - start, 3),
        statistics=progress.statistics,
    )


def _score_segments(
    run: ScoringRun, state: RunState, manifest: Manifest, models: ModelRecords
) -> tuple[RowSummary, Snapshot]:
    """Score the rows that are not written yet, one segment after the other. Needs a connection to Ray.

    Returns:
        The sum of the summaries of all rows, and the progress at the end.
    """
    output, segments = run.output, manifest.segments(run.output.manifest)
    written = take_over(output, state, manifest)
    remove_leftovers(output, chain.from_iterable(summary.tasks for summary in written.values()))
    rows = manifest.rows - sum(summary.rows for summary in written.values())
    if rows < manifest.rows:
        log.info(f"{manifest.rows - rows} images are scored already, {rows} remain")
    total = RowSummary()
    versions, accept_errors = state.record.versions, run.options.accept_errors
    with show_scoring_progress(rows, versions, stop_on_failures=not accept_errors) as progress:
        for segment in segments:
            summary = written.pop(segment.number, RowSummary())
            if summary.rows < segment.rows:
                if len(segments) > 1:
                    log.info(f"segment {segment.number + 1} of {len(segments)}")
                shards = unwritten_shards(output, segment, summary)
                try:
                    score_shards(run, shards, segment.number, models, progress, state)
                except Exception as error:
                    if is_ray_failure(error):
                        # Raise RunDamagedError if a shard is damaged: the next run would fail at it again.
                        with suppress(OSError):
                            storage.in_parallel(lambda shard: read_shard(shard.uri).num_rows, shards)
                    raise
                summary = finish_segment(output, segment)
            # The names of all tasks may be many.
            total = RowSummary.total([total, dataclasses.replace(summary, tasks=[])])
        return total, progress.read()
