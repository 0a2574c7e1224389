"""Score a collection: the score job."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial

from stpm import storage
from stpm.calibration import shortfall
from stpm.console import ALL_DONE, NOTHING_DONE, SOME_FAILED, Say
from stpm.errors import DataError, ModelError
from stpm.models import ModelStore
from stpm.options import ClusterOptions
from stpm.placement import on_cluster, say_plan
from stpm.record import ModelRecord
from stpm.scoring import manifest
from stpm.scoring.categories import Categories
from stpm.scoring.ledger import Counts, Identity
from stpm.scoring.options import CollectionOptions, ScoreOptions
from stpm.scoring.passes import Pass, failed_rows, run_pass
from stpm.scoring.pipeline import planned
from stpm.scoring.rehearsal import rehearse
from stpm.scoring.sources import STANDARD_INPUT, rows_of
from stpm.scoring.target import Target
from stpm.scoring.triage import write_triage

_SHOWN = 10


def run_score(collection: CollectionOptions, options: ScoreOptions, cluster: ClusterOptions, say: Say) -> int:
    """The score job. Returns its exit code: 0 all scored, 2 too many images could not be, 3 none could.

    Raises:
        ConfigError: if the options cannot be run, or the run folder holds another pass.
    """
    named = [collection.models, collection.out, *collection.allow]
    named += [source for source in collection.images if source != STANDARD_INPUT]
    with on_cluster(cluster, named, say):
        if cluster.plan:
            say_plan({"scores": partial(planned, options)}, say)
            return ALL_DONE
        return _score(collection, options, say)


def _score(collection: CollectionOptions, options: ScoreOptions, say: Say) -> int:
    target = dataclasses.replace(
        Target.alone(storage.absolute(collection.out)),
        heatmaps=collection.heatmaps,
        heatmaps_in=collection.heatmaps_in,
        raw_maps=collection.raw_maps,
        overlays=collection.overlay,
        partition_by=collection.partition_by,
    )
    store = ModelStore(collection.models)
    sources = tuple(s if s == STANDARD_INPUT else storage.absolute(s) for s in collection.images)
    categories = Categories(collection.category, collection.category_from)
    identity = Identity(
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
    )
    of = Pass(lambda: rows_of(sources, categories, collection.allow, sys.stdin), identity, store, options, target)
    try:
        if collection.dry_run:
            rehearse(of, say)
            return ALL_DONE
        counts = run_pass(of, start_over=collection.fresh, replace=False, say=say)
    except (ModelError, DataError) as error:
        say(f"error: {error}")
        return NOTHING_DONE
    records = _records(store, target)
    if collection.top:
        write_triage(target, collection.top, {record.category: record.preprocessing for record in records})
    if warning := shortfall({r.category: r.fit.calibration_count for r in records}, options.false_alarm_rate):
        say(warning)
    return _tell(counts, target, collection.max_error_rate, say)


def _records(store: ModelStore, target: Target) -> list[ModelRecord]:
    """Of the models that scored something."""
    fixed = manifest.read(target.manifest)
    return [store.record(name) for name in sorted(set(store.categories()) & set(fixed.categories if fixed else ()))]


def _tell(counts: Counts, target: Target, max_error_rate: float, say: Say) -> int:
    for row in failed_rows(target, _SHOWN):
        say(f"{row['uri']}: {row['error_kind']}: {row['error_message']}")
    kinds = ", ".join(f"{number} {kind}" for kind, number in counts.errors.items())
    say(
        f"{counts.rows} rows in {target.scores}: {counts.anomalous} anomalous, {counts.failed} with an error"
        f"{f' ({kinds})' if kinds else ''}"
    )
    if counts.rows and counts.failed == counts.rows:
        return NOTHING_DONE
    return SOME_FAILED if counts.failed > max_error_rate * counts.rows else ALL_DONE
