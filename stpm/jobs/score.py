"""Score a collection: the score job."""

from __future__ import annotations

import dataclasses
import logging
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import IO

import pyarrow as pa

from stpm import storage
from stpm.cluster.placement import log_plan, on_cluster
from stpm.console import ALL_DONE, NOTHING_DONE, SOME_FAILED
from stpm.errors import DataError, ModelError
from stpm.lease import held
from stpm.method.calibration import Normals, shortfall
from stpm.models.store import ModelStore
from stpm.options import ClusterOptions
from stpm.scoring.dry_run import dry_run
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.manifest import image_id
from stpm.scoring.inputs.sources import STANDARD_INPUT, image_rows
from stpm.scoring.options import CollectionOptions, ScoreOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.pipeline import planned
from stpm.scoring.resuming.run_state import Counts, RunConfig, RunState
from stpm.scoring.run import ScoringRun, failed_rows, run_scoring

log = logging.getLogger(__name__)

_SHOWN = 10


def run_score(collection: CollectionOptions, options: ScoreOptions, cluster: ClusterOptions) -> int:
    """The score job. Returns its exit code: 0 all scored, 2 some are left or too many could not be, 3 none could.

    Raises:
        ConfigError: if the options cannot be run, the run folder holds another pass, or another run is at work in it.
    """
    out = storage.output_folder(collection.out)
    named = [collection.models, out, *collection.allow]
    named += [source for source in collection.images if source != STANDARD_INPUT]
    with on_cluster(cluster, named):
        if cluster.plan:
            log_plan({"scores": partial(planned, options)})
            return ALL_DONE
        # A dry run writes to a folder of its own.
        lease = nullcontext() if collection.dry_run else held(out, collection.wait)
        with lease, taken_in(sys.stdin if STANDARD_INPUT in collection.images else ()) as listed:
            return _score(collection, options, out, listed)


def _score(collection: CollectionOptions, options: ScoreOptions, out: str, listed: tuple[str, IO[str]]) -> int:
    digest, lines = listed
    output = dataclasses.replace(
        RunOutput.alone(out),
        heatmaps=collection.heatmaps,
        heatmaps_in=collection.heatmaps_in,
        raw_maps=collection.raw_maps,
        overlays=collection.overlay,
        partition_by=collection.partition_by,
    )
    store = ModelStore(collection.models)
    sources = tuple(s if s == STANDARD_INPUT else storage.absolute(s) for s in collection.images)
    rule = CategoryRule(collection.category, collection.category_from)
    config = RunConfig(
        images=sources,
        false_alarm_rate=options.false_alarm_rate,
        heatmaps=collection.heatmaps,
        raw_maps=collection.raw_maps,
        overlay=collection.overlay,
        heatmaps_in=collection.heatmaps_in,
        partition_by=collection.partition_by,
        category=collection.category,
        category_from=collection.category_from,
        allow=tuple(collection.allow),
        standard_input=digest,
    )

    def rows() -> Iterator[pa.Table]:
        lines.seek(0)
        return image_rows(sources, rule, collection.allow, lines)

    of = ScoringRun(rows, config, store, options, output, collection.top)
    run_state = RunState(output.home)
    try:
        if collection.dry_run:
            dry_run(of)
            return ALL_DONE
        again = not collection.fresh and run_state.done() is not None
        counts = run_scoring(of, start_over=collection.fresh, replace=False)
    except (ModelError, DataError) as error:
        log.info(f"error: {error}")
        return NOTHING_DONE
    if counts.left:
        return SOME_FAILED
    _, models = run_state.models()
    fits = {name: store.record(name, model_id).fit for name, model_id in models.items()}
    normals = {name: Normals(fit.good_count, fit.calibration_count) for name, fit in fits.items()}
    if warning := shortfall(normals, options.false_alarm_rate):
        log.info(warning)
    if not again:
        for row in failed_rows(output, _SHOWN):
            log.info(f"{row['uri']}: {row['error_kind']}: {row['error_message']}")
    return _tell(counts, output, collection.max_error_rate)


@contextmanager
def taken_in(lines: Iterable[str]) -> Iterator[tuple[str, IO[str]]]:
    """Take in a list of URIs; gives what tells it from other lists, in whatever order, and a file that holds it."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="surrogateescape") as file:
        number = total = 0
        for line in filter(None, map(str.strip, lines)):
            number += 1
            total += image_id(storage.as_utf8(storage.absolute(line)))
            print(line, file=file)
        yield f"{number} lines, digest {total % 2**64:016x}" if number else "", file


def _tell(counts: Counts, output: RunOutput, max_error_rate: float) -> int:
    kinds = ", ".join(f"{number} {kind}" for kind, number in counts.errors.items())
    log.info(
        f"{counts.rows} rows in {output.scores}: {counts.anomalous} anomalous, {counts.failed} with an error"
        f"{f' ({kinds})' if kinds else ''}"
    )
    if counts.rows and counts.failed == counts.rows:
        return NOTHING_DONE
    return SOME_FAILED if counts.failed > max_error_rate * counts.rows else ALL_DONE
