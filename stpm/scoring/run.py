"""One run of scoring: write the manifest first, then each row once, and `_SUCCESS` last, whatever is killed."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from stpm import storage
from stpm.cluster.connection import connected
from stpm.cluster.ray_failures import cut_off_by_ray, is_ray_failure
from stpm.errors import (
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
from stpm.scoring.inputs.manifest import Manifest, Segment, Shard, read_manifest, read_shard, write_manifest
from stpm.scoring.pipeline import score_shards
from stpm.scoring.progress import ProgressReporter, Snapshot
from stpm.scoring.progress_display import show_scoring_progress
from stpm.scoring.resuming.remaining import remaining_segments
from stpm.scoring.resuming.segments import commit_segment, committed_segments, committed_summaries, total_of_finished
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
        CutOffError: if storage, a node or Ray failed.
    """
    state, manifest, models = resume_or_start(run, start_over=start_over, replace=replace)
    finished = _read_finished(state)
    scored = finished or _score_remaining(run, manifest, models)
    if scored.unfinished:
        return scored, models
    result = _find_discoveries(run, scored, models)
    if run.triage_images and (run.triage_images != state.triage_images() or result != scored):
        _write_page(run, state, result, models)
    if not finished:
        state.finish(result)
    elif result != finished:
        state.update_result(result)
    run.output.clear_checkpoints()
    return result, models


def _read_finished(state: RunState) -> RunResult | None:
    """Read the result of a finished run; None if it is not finished."""
    if not state.is_finished():
        return None
    log.info(f"all images of this run are scored already; its result is in {state.uri}")
    return state.result()


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


def resume_or_start(run: ScoringRun, *, start_over: bool, replace: bool) -> tuple[RunState, Manifest, ModelRecords]:
    """Resume the run that the output holds, or start one: fix its manifest and its models.

    Raises:
        StpmError: see `run_scoring`.
    """
    state = RunState(run.output.state_folder)
    found = None if start_over else _resume(run, state, replace=replace)
    manifest, models = found or _start(run, state)
    state.bind_models(_model_ids(models), run.store.uri)
    return state, manifest, models


def _resume(run: ScoringRun, state: RunState, *, replace: bool) -> tuple[Manifest, ModelRecords] | None:
    """Read the manifest and the models of the run that the output holds; None if a new run is to be started."""
    differences = state.config_differences(run.config)
    if not differences:
        # An unfinished run goes on with its models, even if newer ones are current.
        model_ids = None if replace or state.is_finished() else state.model_ids()
        manifest, models = _read_inputs(run, model_ids)
        differences = state.model_differences(_model_ids(models))
        if not differences:
            if model_ids:
                log.info("the models are those that this run began with, even if others became current since")
                if changed := state.version_differences():
                    log.warning(f"the remaining images may get slightly other scores: {join_first(changed)}")
            return manifest, models
    # A run without rows may be replaced, and one whose removal was cut off. `clear` keeps rows without a run.json.
    may_be_replaced = replace or state.is_cleared() or not state.exists()
    if not may_be_replaced and run.output.files():
        raise OtherRunError(f"{run.output.folder} holds the rows of another run: {join_first(differences)}")
    return None


def _start(run: ScoringRun, state: RunState) -> tuple[Manifest, ModelRecords]:
    """Remove what earlier runs wrote, and write the manifest.

    Keep the rows of an earlier run if this one could not be made: list all images, and read their models, first.
    """
    if run.output.files():
        categories = {name for rows in run.rows() for name in rows["category"].unique().to_pylist()}
        read_models(run.store, categories)
    run.output.clear()
    state.start(run.config)
    return _read_inputs(run)


def _read_inputs(run: ScoringRun, model_ids: Mapping[str, str] | None = None) -> tuple[Manifest, ModelRecords]:
    folder = run.output.manifest
    manifest = read_manifest(folder) or write_manifest(run.rows(), folder, run.options.segment_rows)
    log.info(manifest.describe())
    return manifest, read_models(run.store, manifest.categories, model_ids)


def read_models(
    store: ModelStore, categories: Iterable[str], model_ids: Mapping[str, str] | None = None
) -> ModelRecords:
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
    models = {name: each for name, each in found.items() if not isinstance(each, str)}
    problems = [each for each in found.values() if isinstance(each, str)]
    if not models:
        raise ModelError(join_first(problems) or "no image has a category; see --category and --category-from")
    if problems:
        log.warning(f"no model for {len(problems)} of {len(names)} categories: {join_first(problems)}")
    return models


def _model_ids(models: ModelRecords) -> dict[str, str]:
    return {category: record.model_id for category, record in models.items()}


class _Remaining(NamedTuple):
    """What is left of a run.

    Args:
        segments: those that are not committed, as in the manifest.
        shards: of the rows to score, by the number of their segment. A segment without any has only to be committed.
        committed: number of the other segments.
    """

    segments: list[Segment]
    shards: dict[int, tuple[Shard, ...]]
    committed: int

    @property
    def rows(self) -> int:
        """The number of rows to score."""
        return sum(shard.rows for shards in self.shards.values() for shard in shards)


def _score_remaining(run: ScoringRun, manifest: Manifest, models: ModelRecords) -> RunResult:
    """Score the images without a row, segment by segment, and add up the summaries of all rows."""
    start = time.perf_counter()
    with connected(), cut_off_by_ray("scoring"):
        remaining = _plan_remaining(run, manifest)
        total, snapshot = _score_segments(run, remaining, models)
    # Killed processes leave unfinished files, in this run too: Ray repeats their tasks. Only a local folder is listed.
    storage.remove_unfinished(run.output.heatmaps)
    missing = manifest.rows - total.rows
    if missing and not snapshot.unfinished:
        raise RunDamagedError(f"{total.rows} rows in {run.output.scores} for {manifest.rows} images")
    if missing:
        _log_unfinished(missing, snapshot.unfinished)
    return _result(total, missing, time.perf_counter() - start, snapshot.statistics)


def _plan_remaining(run: ScoringRun, manifest: Manifest) -> _Remaining:
    """Find the rows that are not written yet. Needs a connection to Ray."""
    committed = committed_segments(run.output)
    segments = [each for each in manifest.segments(run.output.manifest) if each.number not in committed]
    shards = {each.number: each.shards for each in remaining_segments(run.output, segments)}
    remaining = _Remaining(segments, shards, len(committed))
    if remaining.rows < manifest.rows:
        log.info(f"{manifest.rows - remaining.rows} images are scored already, {remaining.rows} remain")
    return remaining


def _score_segments(run: ScoringRun, remaining: _Remaining, models: ModelRecords) -> tuple[RowSummary, Snapshot]:
    """Score the remaining rows, and commit their segments. Needs a connection to Ray.

    Returns:
        The sum of the summaries of all segments, and the progress at the end.
    """
    segments, shards, committed = remaining
    total = RowSummary.total(committed_summaries(run.output), max_ranked=0)
    with show_scoring_progress(remaining.rows, stop_on_failures=not run.options.accept_errors) as progress:
        for segment in segments:
            if to_score := shards.get(segment.number):
                if len(shards) > 1:
                    log.info(f"segment {segment.number + 1} of {len(segments) + committed}")
                _score_segment(run, segment.number, to_score, models, progress)
            written = commit_segment(run.output, run.config.output, segment, run.triage_images)
            total = RowSummary.total([total, written], max_ranked=0)
        return total, progress.read()


def _score_segment(
    run: ScoringRun, number: int, shards: Sequence[Shard], models: ModelRecords, progress: ProgressReporter
) -> None:
    try:
        score_shards(run, shards, run.output.segment_checkpoints(number), models, progress)
    except Exception as error:
        if is_ray_failure(error):
            _check_shards(shards)
        raise


def _check_shards(shards: Sequence[Shard]) -> None:
    """Raise RunDamagedError if a shard is damaged: the next run would fail at it again."""
    with suppress(OSError):
        storage.in_parallel(lambda shard: read_shard(shard.uri).num_rows, shards)


def _log_unfinished(count: int, examples: Iterable[UnfinishedImage]) -> None:
    for image in examples:
        log.info(str(image))
    log.info(
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
