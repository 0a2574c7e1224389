"""One run of scoring: write the manifest first, then each row once, and `_SUCCESS` last, whatever is killed."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from ray.data.exceptions import ExecutionTimeoutError, SystemException
from ray.exceptions import RayError

from stpm import storage
from stpm.cluster.connection import connected
from stpm.errors import (
    CutOffError,
    DataError,
    ModelError,
    ModelUnreadableError,
    NoModelError,
    OtherRunError,
    RunDamagedError,
    join_first,
)
from stpm.method.false_discovery import find_discoveries
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.scoring.inputs import manifest
from stpm.scoring.inputs.manifest import Manifest, Shard
from stpm.scoring.pipeline import ScoringRun, score_shards
from stpm.scoring.progress import ProgressReporter, show_scoring_progress
from stpm.scoring.resuming.remaining import remaining_segments
from stpm.scoring.resuming.run_state import RunState
from stpm.scoring.resuming.segments import commit_segment, committed_segments, committed_summaries, total_of_finished
from stpm.scoring.row_summary import RowSummary
from stpm.scoring.run_statistics import RunResult
from stpm.scoring.triage import write_triage

# By category.
Records = dict[str, ModelRecord]

log = logging.getLogger(__name__)


def run_scoring(run: ScoringRun, *, start_over: bool = False, replace: bool = False) -> tuple[RunResult, Records]:
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
        CutOffError: if storage, a node or Ray failed.
    """
    state, listed, records = resume_or_start(run, start_over=start_over, replace=replace)
    finished = _read_finished(state)
    scored = finished or _score_remaining(run, listed, records)
    if scored.unfinished:
        return scored, records
    result = _find_discoveries(run, scored, records)
    if run.triage_images and (run.triage_images != state.triage_images() or result != scored):
        _write_page(run, state, result, records)
    if not finished:
        state.finish(result)
    elif result != finished:
        state.update_result(result)
    run.output.clear_checkpoints()
    return result, records


def _read_finished(state: RunState) -> RunResult | None:
    """Read the result of a finished run; None if it is not finished."""
    if not state.is_finished():
        return None
    log.info(f"all of them are scored already, see {state.uri}")
    return state.result()


def _find_discoveries(run: ScoringRun, result: RunResult, records: Records) -> RunResult:
    """Return the result with the discoveries at the run's rate, unless it has them already."""
    if run.fdr == (result.discoveries.rate if result.discoveries else 0.0):
        return result
    total = total_of_finished(run.output, result.rows, run.triage_images)
    calibration = {name: record.fit.calibration_count for name, record in records.items()}
    found = find_discoveries(total.p_values, calibration, run.fdr) if run.fdr else None
    return dataclasses.replace(result, discoveries=found)


def _write_page(run: ScoringRun, state: RunState, result: RunResult, records: Records) -> None:
    """Write the page of the most anomalous images, and record that."""
    # A page of some of the summaries would lack images.
    total_of_finished(run.output, result.rows, run.triage_images)
    preprocessing = {name: record.preprocessing for name, record in records.items()}
    write_triage(run.output, run.triage_images, preprocessing, result.discoveries)
    state.record_triage(run.triage_images)


def resume_or_start(run: ScoringRun, *, start_over: bool, replace: bool) -> tuple[RunState, Manifest, Records]:
    """Resume the run that the output holds, or start one: fix its manifest and its models.

    Raises:
        StpmError: see `run_scoring`.
    """
    state = RunState(run.output.state_folder)
    found = None if start_over else _resume(run, state, replace=replace)
    listed, records = found or _start(run, state)
    state.bind_models(_model_ids(records), run.store.uri)
    return state, listed, records


def _resume(run: ScoringRun, state: RunState, *, replace: bool) -> tuple[Manifest, Records] | None:
    """Read the manifest and the models of the run that the output holds; None if a new run is to be started."""
    differences = state.config_differences(run.config)
    if not differences:
        # An unfinished run goes on with its models, even if newer ones are current.
        model_ids = None if replace or state.is_finished() else state.model_ids()
        listed, records = _read_inputs(run, model_ids)
        differences = state.model_differences(_model_ids(records))
        if not differences:
            if model_ids:
                log.info("the models are those that this run began with, not those that became current since")
            return listed, records
    # A run without rows may be replaced.
    if not replace and run.output.files():
        raise OtherRunError(f"{run.output.folder} holds the rows of another run: {join_first(differences)}")
    return None


def _start(run: ScoringRun, state: RunState) -> tuple[Manifest, Records]:
    """Remove what earlier runs wrote, and write the manifest."""
    run.output.clear()
    state.start(run.config)
    return _read_inputs(run)


def _read_inputs(run: ScoringRun, model_ids: Mapping[str, str] | None = None) -> tuple[Manifest, Records]:
    listed = manifest.read(run.output.manifest) or manifest.write(
        run.rows(), run.output.manifest, run.options.segment_rows
    )
    log.info(listed.describe())
    return listed, _read_records(run.store, listed.categories, model_ids)


def _read_records(store: ModelStore, categories: Iterable[str], model_ids: Mapping[str, str] | None) -> Records:
    """Read the records of the models of those categories that have one.

    Args:
        store: to read from.
        categories: names; "" is ignored.
        model_ids: the model of each category, and of no other; None: the current ones.
    """

    def read(category: str) -> ModelRecord | str:
        """Return the record, or why there is none."""
        try:
            return store.record(category, (model_ids or {}).get(category, ""))
        except (NoModelError, DataError) as error:
            # Do not catch the errors of damaged or unreadable models: a row without a model is never scored again.
            return str(error)
        except ModelUnreadableError:
            raise
        except ModelError as error:
            if not model_ids:
                raise
            raise RunDamagedError(f"{error}; this run began with that model") from error

    names = [name for name in categories if name and (model_ids is None or name in model_ids)]
    found = dict(zip(names, storage.in_parallel(read, names), strict=True))
    records = {name: each for name, each in found.items() if not isinstance(each, str)}
    problems = [each for each in found.values() if isinstance(each, str)]
    if not records:
        raise ModelError(join_first(problems) or "no image has a category; see --category and --category-from")
    if problems:
        log.warning(f"{len(problems)} categories have no model: {join_first(problems)}")
    return records


def _model_ids(records: Records) -> dict[str, str]:
    return {category: record.model_id for category, record in records.items()}


def _score_remaining(run: ScoringRun, listed: Manifest, records: Records) -> RunResult:
    """Score the images without a row, segment by segment, and add up the summaries of all rows."""
    start = time.perf_counter()
    with connected():
        committed = committed_segments(run.output)
        segments = [each for each in listed.segments(run.output.manifest) if each.number not in committed]
        remaining = {each.number: each.shards for each in remaining_segments(run.output, segments)}
        to_score = sum(rows for shards in remaining.values() for _, rows in shards)
        if to_score < listed.rows:
            log.info(f"{listed.rows - to_score} are scored already, {to_score} remain")
        total = RowSummary.total(committed_summaries(run.output), run.triage_images)
        with show_scoring_progress(to_score, stop_on_failures=not run.options.accept_errors) as report:
            for segment in segments:
                if segment.number in remaining:
                    if len(remaining) > 1:
                        log.info(f"segment {segment.number + 1} of {len(segments) + len(committed)}")
                    _score_segment(run, segment.number, remaining[segment.number], records, report)
                written = commit_segment(run.output, segment, run.triage_images)
                total = RowSummary.total([total, written], run.triage_images)
            statistics, unfinished, *_ = report.read()
    # Killed processes leave unfinished files, in this run too: Ray repeats their tasks. Only a local folder is listed.
    storage.remove_unfinished(run.output.heatmaps)
    missing = listed.rows - total.rows
    if missing and not unfinished:
        raise RunDamagedError(f"{total.rows} rows in {run.output.scores} for {listed.rows} images")
    if missing:
        for image in unfinished:
            log.info(str(image))
        log.info(
            f"{missing} images are unfinished, because storage, a model or a device failed: run the same command again "
            "to try them again, or with --accept-errors to write such errors as rows"
        )
    seconds = round(time.perf_counter() - start, 3)
    return RunResult(
        rows=total.rows,
        anomalous=total.anomalous,
        errors=total.errors,
        error_examples=total.error_examples,
        categories=total.categories,
        bytes_read=total.bytes_read,
        unfinished=missing,
        seconds=seconds,
        statistics=statistics,
    )


def _check_shards(shards: Sequence[Shard]) -> None:
    """Raise RunDamagedError if a shard is damaged: the next run would fail at it again."""
    with suppress(OSError):
        storage.in_parallel(lambda shard: manifest.read_shard(shard[0]).num_rows, shards)


def _score_segment(
    run: ScoringRun, number: int, shards: Sequence[Shard], records: Records, report: ProgressReporter
) -> None:
    try:
        score_shards(run, shards, run.output.segment_checkpoints(number), records, report)
    except (RayError, SystemException, ExecutionTimeoutError) as error:
        log.exception("the pipeline failed")
        _check_shards(shards)
        raise CutOffError(
            f"scoring was cut off: {str(error).strip().splitlines()[-1]}; what was done is kept, run the same command "
            "again to go on"
        ) from error
