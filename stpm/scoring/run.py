"""A pass over a collection: its manifest fixed first, every row written once, whatever kills it, `_SUCCESS` last."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from ray.data.exceptions import ExecutionTimeoutError, SystemException
from ray.exceptions import RayError

from stpm.cluster.connection import connected
from stpm.console import is_terminal, show_progress
from stpm.errors import ConfigError, CutOffError, DataError, ModelError, NoModelError
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.scoring.inputs import manifest
from stpm.scoring.inputs.manifest import Manifest
from stpm.scoring.options import ScoreOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.pipeline import score_shards
from stpm.scoring.progress import Left, Progress
from stpm.scoring.resuming.remaining import remaining_shards
from stpm.scoring.resuming.run_state import Counts, Effort, RunConfig, RunState
from stpm.scoring.triage import write_triage

_SHOWN = 5
_ERROR_COLUMNS = ["uri", "error_kind", "error_message"]


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoringRun:
    """What a run is asked to do.

    Args:
        rows: makes the manifest's rows; not called where an earlier run fixed them.
        config: what decides the rows that come out.
        store: the models.
        options: how to score.
        output: where to write.
        top: images on the page of the most anomalous ones; 0: no page.
    """

    rows: Callable[[], Iterable[pa.Table]]
    config: RunConfig
    store: ModelStore
    options: ScoreOptions
    output: RunOutput
    top: int = 0


def run_scoring(of: ScoringRun, *, start_over: bool, replace: bool) -> Counts:
    """Score what is not yet scored, on Ray.

    Args:
        of: the pass.
        start_over: forget what earlier runs did.
        replace: start over where something differs, instead of refusing.

    Returns:
        The counts of the whole pass. It has not ended where images are left.

    Raises:
        ConfigError: if the output holds another pass, or the scorers do not fit the cluster.
        DataError: if the sources cannot be read.
        ModelError: if no row's category has a model, or storage does not give one that may be there.
        CutOffError: if storage, a node or Ray failed for good.
    """
    run_state = RunState(of.output.home)
    fixed = take_up(of, start_over=start_over, replace=replace)
    log.info(fixed.describe())
    records = _records(of.store, fixed.categories)
    if differences := run_state.bind({name: r.model_id for name, r in records.items()}, of.store.uri):
        _refuse_unless(replace, of.output, differences)
        return run_scoring(of, start_over=True, replace=replace)
    if counts := run_state.done():
        log.info(f"all of them are scored already, see {run_state.run_uri}")
        of.output.clear_state()
        _write_page(of, run_state, records)
        return counts
    start = time.perf_counter()
    effort = Effort()
    failed: list[Left] = []
    with connected():
        shards = remaining_shards(of.output)
        left = sum(rows for _, rows in shards)
        if left < fixed.rows:
            log.info(f"{fixed.rows - left} are scored already, {left} are left")
        if left:
            progress = Progress(left, show_progress if is_terminal() else None)
            try:
                effort, failed = score_shards(shards, records, of.store, of.options, of.output, progress)
            except (RayError, SystemException, ExecutionTimeoutError) as error:
                log.exception("the pipeline ended")
                raise CutOffError(
                    f"scoring was cut off: {str(error).strip().splitlines()[-1]}; what was done is kept, run the same "
                    "command again to go on"
                ) from error
    counts = count(of.output)
    if failed and counts.rows < fixed.rows:
        return _tell_of(failed, dataclasses.replace(counts, left=fixed.rows - counts.rows))
    if counts.rows != fixed.rows:
        raise ConfigError(f"{counts.rows} rows in {of.output.scores} for {fixed.rows} images; run again with --fresh")
    _write_page(of, run_state, records)
    run_state.finish(counts, dataclasses.replace(effort, seconds=round(time.perf_counter() - start, 3)))
    of.output.clear_state()
    return counts


def take_up(of: ScoringRun, *, start_over: bool, replace: bool) -> Manifest:
    """Go on with the pass that the output holds, or start one; returns its manifest.

    Raises:
        ConfigError: if the output holds rows of another pass, or what no run made.
        DataError: if the sources, or the manifest that is there, cannot be read.
    """
    run_state = RunState(of.output.home)
    differences = [] if start_over else run_state.differences(of.config)
    if differences:
        _refuse_unless(replace, of.output, differences)
    if start_over or differences:
        if not run_state.exists() and (foreign := of.output.occupied()):
            raise ConfigError(
                f"{foreign[0]} is there, and no {run_state.run_uri} says that a run made it; name another --out"
            )
        of.output.clear()
        run_state.begin(of.config)
    return manifest.read(of.output.manifest) or manifest.write(of.rows(), of.output.manifest)


def _write_page(of: ScoringRun, run_state: RunState, records: Mapping[str, ModelRecord]) -> None:
    """Write triage.html, unless it is there with as many images as are wanted."""
    if of.top and of.top != run_state.page():
        write_triage(of.output, of.top, {name: record.preprocessing for name, record in records.items()})
        run_state.wrote_page(of.top)


def _tell_of(failed: Sequence[Left], counts: Counts) -> Counts:
    """Say what is left of a pass, and why."""
    for image in failed:
        log.info(f"{image.uri}: {image.error_kind}: {image.error_message}")
    log.info(
        f"{counts.left} images are left, which storage, a model or a device failed: run the same command again to try "
        "them, or with --accept-errors to take such errors as results"
    )
    return counts


def count(output: RunOutput) -> Counts:
    """Go through the rows of a pass, some at a time."""
    columns = ["category", "error_kind", "is_anomalous", "bytes"]
    rows = anomalous = size = 0
    errors: dict[str, int] = {}
    categories: dict[str, dict[str, int]] = {}
    for batch in output.dataset().to_batches(columns):
        table = pa.Table.from_batches([batch])
        rows += table.num_rows
        anomalous += pc.sum(table["is_anomalous"]).as_py() or 0
        size += pc.sum(table["bytes"]).as_py() or 0
        by_kind = table.group_by(["category", "error_kind"]).aggregate([("is_anomalous", "sum"), ([], "count_all")])
        for group in by_kind.to_pylist():
            of = categories.setdefault(group["category"], {"rows": 0, "anomalous": 0, "errors": 0})
            of["rows"] += group["count_all"]
            of["anomalous"] += group["is_anomalous_sum"] or 0
            if group["error_kind"]:
                of["errors"] += group["count_all"]
                errors[group["error_kind"]] = errors.get(group["error_kind"], 0) + group["count_all"]
    return Counts(rows, anomalous, dict(sorted(errors.items())), dict(sorted(categories.items())), size)


def failed_rows(output: RunOutput, most: int) -> list[dict[str, str]]:
    """The first rows with an error: uri, error_kind, error_message."""
    rows: list[dict[str, str]] = []
    # A file at a time and to its end: a scan that is left early goes on in threads, and they crash at exit where the
    # filesystem is Python's.
    for file in output.dataset().get_fragments():
        rows += file.to_table(columns=_ERROR_COLUMNS, filter=ds.field("error_kind") != "").to_pylist()
        if len(rows) >= most:
            break
    return rows[:most]


def _records(store: ModelStore, categories: Iterable[str]) -> dict[str, ModelRecord]:
    """The models of these categories, those that have one."""
    records, problems = {}, []
    for category in categories:
        try:
            if category:
                records[category] = store.record(category)
        except (NoModelError, DataError) as error:
            # A model that is damaged, or that storage does not give, is raised: rows without a model are final.
            problems.append(str(error))
    if not records:
        raise ModelError("; ".join(problems[:_SHOWN]) or "no image has a category; see --category and --category-from")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        log.info(f"warning: {len(problems)} categories have no model: {'; '.join(problems[:_SHOWN])}{more}")
    return records


def _refuse_unless(replace: bool, output: RunOutput, differences: list[str]) -> None:
    """A pass that has not written a row yet is nobody's loss."""
    if not replace and output.files():
        raise ConfigError(
            f"{output.out} holds the rows of another pass: {'; '.join(differences[:_SHOWN])}. Give another "
            "--out, or --fresh to remove it and start over"
        )
