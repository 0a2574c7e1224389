"""One run of scoring: write the manifest first, then each row once, and `_SUCCESS` last, whatever is killed."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress

from stpm import storage
from stpm.cluster.connection import connected
from stpm.cluster.ray_failures import cut_off_by_ray, is_ray_failure
from stpm.errors import RunDamagedError
from stpm.method.false_discovery import find_discoveries
from stpm.scoring.inputs.manifest import Manifest, Shard, read_shard
from stpm.scoring.pipeline import score_shards
from stpm.scoring.progress import Snapshot, show_scoring_progress
from stpm.scoring.resuming.remaining import remaining_shards
from stpm.scoring.resuming.resume import resume_or_start
from stpm.scoring.resuming.segments import (
    commit_segment,
    committed_segments,
    committed_summaries,
    remove_leftovers,
    total_of_finished,
)
from stpm.scoring.row_summary import RowSummary
from stpm.scoring.run_state import RunState
from stpm.scoring.run_statistics import RunResult, RunStatistics, UnfinishedImage
from stpm.scoring.scoring_run import ModelRecords, ScoringRun
from stpm.scoring.triage import write_triage

log = logging.getLogger(__name__)


def run_scoring(run: ScoringRun, *, start_over: bool = False, replace: bool = False) -> tuple[RunResult, ModelRecords]:
    """Score all images that have no row yet, on Ray. With the last of them, find discoveries and write the page.

    Args:
        run: what to do.
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
        CutOffError: if storage, a node or Ray failed.
    """
    state, manifest, models = resume_or_start(run, start_over=start_over, replace=replace)
    run = dataclasses.replace(run, output=dataclasses.replace(run.output, attempt=state.next_attempt()))
    finished = _read_finished(run, state)
    scored = finished or _score_remaining(run, state, manifest, models)
    if scored.unfinished:
        return scored, models
    remove_leftovers(run.output, manifest.attempt)
    result = _find_discoveries(run, scored, models)
    if run.triage_images and (run.triage_images != state.triage_images() or result != scored):
        _write_page(run, state, result, models)
    if not finished:
        state.finish(result)
    elif result != finished:
        state.update_result(result)
    run.output.clear_attempts(run.output.attempt + 1)
    return result, models


def _read_finished(run: ScoringRun, state: RunState) -> RunResult | None:
    """Read the result of a finished run; None if it is not finished."""
    if not state.is_finished():
        return None
    log.info(
        f"all images of this run are scored already; its result is in {state.uri}. Files that came after it began are "
        "not in it"
    )
    result = state.result()
    # Raise if summaries are missing: then it is not known which rows count.
    total_of_finished(run.output, result.rows)
    return result


def _find_discoveries(run: ScoringRun, result: RunResult, models: ModelRecords) -> RunResult:
    """Return the result with the discoveries at the run's rate, unless it has them already."""
    if run.fdr == (result.discoveries.rate if result.discoveries else 0.0):
        return result
    if not run.fdr:
        return dataclasses.replace(result, discoveries=None)
    p_values = total_of_finished(run.output, result.rows).p_values
    calibration = {name: record.fit.calibration_count for name, record in models.items()}
    return dataclasses.replace(result, discoveries=find_discoveries(p_values, calibration, run.fdr))


def _write_page(run: ScoringRun, state: RunState, result: RunResult, models: ModelRecords) -> None:
    """Write the page of the most anomalous images, and record that."""
    total = total_of_finished(run.output, result.rows, run.triage_images)
    preprocessing = {name: record.preprocessing for name, record in models.items()}
    write_triage(run.output, total, run.triage_images, preprocessing, result.discoveries)
    state.record_triage(run.triage_images)


def _score_remaining(run: ScoringRun, state: RunState, manifest: Manifest, models: ModelRecords) -> RunResult:
    """Score the images without a row, segment by segment, and add up the summaries of all rows."""
    start = time.perf_counter()
    with connected(), cut_off_by_ray("scoring"):
        total, snapshot = _score_segments(run, state, manifest, models)
    # Killed processes leave unfinished files, in this run too: Ray repeats their tasks. Only a local folder is listed.
    storage.remove_unfinished(run.output.heatmaps)
    missing = manifest.rows - total.rows
    if missing and not snapshot.unfinished:
        raise RunDamagedError(f"{total.rows} rows in {run.output.scores} for {manifest.rows} images")
    if missing:
        _log_unfinished(missing, snapshot.unfinished)
    return _result(total, missing, time.perf_counter() - start, snapshot.statistics)


def _score_segments(
    run: ScoringRun, state: RunState, manifest: Manifest, models: ModelRecords
) -> tuple[RowSummary, Snapshot]:
    """Score the rows that are not written yet, and commit their segments. Needs a connection to Ray.

    Returns:
        The sum of the summaries of all segments, and the progress at the end.
    """
    every = manifest.segments(run.output.manifest)
    committed = committed_segments(run.output, manifest.attempt)
    segments = [segment for segment in every if segment.number not in committed]
    earlier = dataclasses.replace(run.output, attempt=state.attempt())
    shards_left = remaining_shards(earlier, run.output, segments, run.triage_images)
    state.record_attempt(run.output.attempt)
    remove_leftovers(run.output, manifest.attempt)
    rows = sum(shard.rows for shards in shards_left for shard in shards)
    if rows < manifest.rows:
        log.info(f"{manifest.rows - rows} images are scored already, {rows} remain")
    total = RowSummary.total(committed_summaries(run.output, manifest.attempt), max_ranked=0)
    versions = run.output.state.versions()
    with show_scoring_progress(rows, versions, stop_on_failures=not run.options.accept_errors) as progress:
        for segment, shards in zip(segments, shards_left, strict=True):
            if shards:
                if len(segments) > 1:
                    log.info(f"segment {segment.number + 1} of {len(every)}")
                checkpoints = run.output.segment_checkpoints(segment.number)
                try:
                    score_shards(run, shards, checkpoints, models, progress, state)
                except Exception as error:
                    if is_ray_failure(error):
                        _check_shards(shards)
                    raise
            written = commit_segment(run.output, run.config.output, segment, run.triage_images)
            total = RowSummary.total([total, written], max_ranked=0)
        return total, progress.read()


def _check_shards(shards: Sequence[Shard]) -> None:
    """Raise RunDamagedError if a shard is damaged: the next run would fail at it again."""
    with suppress(OSError):
        storage.in_parallel(lambda shard: read_shard(shard.uri).num_rows, shards)


def _log_unfinished(count: int, examples: Iterable[UnfinishedImage]) -> None:
    for image in examples:
        log.error(str(image))
    log.error(
        f"{count} images are unfinished, because storage, a model or a device failed: run the same command again "
        "to try them again, or with --accept-errors to write such errors as rows"
    )


def _result(total: RowSummary, unfinished: int, seconds: float, statistics: RunStatistics) -> RunResult:
    return RunResult(
        rows=total.rows,
        anomalous=total.anomalous,
        errors=total.errors,
        error_examples=total.error_examples,
        categories=total.categories,
        bytes_read=total.bytes_read,
        unfinished=unfinished,
        seconds=round(seconds, 3),
        statistics=statistics,
    )
