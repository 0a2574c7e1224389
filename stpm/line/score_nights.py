"""Score several nights, the latest first: the first run of a night scores what is there, each later one late files.

A run's list of images is fixed before it starts, and a finished run never changes. A problem with one night does not
stop the others, unless storage, a node or Ray failed while it was scored: then the earlier nights wait for the next
start.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain

import numpy as np
import pyarrow as pa

from stpm import storage
from stpm.cluster.connection import connected
from stpm.errors import (
    ConfigError,
    DataError,
    ModelError,
    NoImagesError,
    NoModelError,
    RunInterruptedError,
    join_first,
    with_remedy,
)
from stpm.lease import Fence
from stpm.line.night import Night
from stpm.line.night_folder import NightFolder
from stpm.line.options import MonitoringOptions, NightlyOptions
from stpm.models.store import ModelStore
from stpm.names import as_utf8
from stpm.options import ClusterOptions
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.manifest import contains, read_shard
from stpm.scoring.inputs.sources import image_rows
from stpm.scoring.options import OutputOptions, ScoreOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.resume import read_models
from stpm.scoring.run import run_scoring
from stpm.scoring.scoring_run import ScoringRun
from stpm.times import duration

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NightlyJob:
    """The options of the job, and its lease of the folder of all nights."""

    options: NightlyOptions
    monitoring: MonitoringOptions
    output: OutputOptions
    scoring: ScoreOptions
    cluster: ClusterOptions
    fence: Fence | None = None

    @cached_property
    def out(self) -> str:
        """The absolute URI of the folder of all nights."""
        return storage.output_folder(self.options.out)

    @property
    def store(self) -> ModelStore:
        """The models."""
        return ModelStore(self.options.models)

    def sources(self, date: datetime.date) -> tuple[str, ...]:
        """Return the absolute URIs of a night's images."""
        return tuple(map(storage.absolute, self.options.sources(date)))

    def empty_night(self, date: datetime.date, problem: str = "") -> Night:
        """Return the record of a night of which no row is counted."""
        return Night(date.isoformat(), self.sources(date), problem=problem)


def score_nights(job: NightlyJob, dates: Sequence[datetime.date]) -> dict[datetime.date, str]:
    """Score what is new in each night, and return the problems by date."""
    known = {folder.date for folder in NightFolder.find_all(job.out)}
    problems = {}
    with ExitStack() as connection:
        for date in dates:
            folder = NightFolder.of(job.out, date)
            try:
                with with_remedy(folder.how_to_start_over):
                    if job.options.fresh and date == dates[0]:
                        _remove_rows(job, folder)
                    for run in _runs_to_score(job, folder):
                        if not storage.exists(job.store.uri):
                            raise NoModelError(f"{job.store.uri}: no models here; fit them first, or see --models")
                        # Not made for nights without new images, and kept for all others.
                        connection.enter_context(connected())
                        log.info(f"{date}, run {run.output.name}: scoring into {folder.uri}")
                        _, models = run_scoring(run)
                        run.warn_about_few_good_images(models)
            except (ConfigError, RunInterruptedError, DataError, ModelError, OSError) as error:
                problems[date] = problem = as_utf8(str(error))
                log.error(f"{date}: {problem}")
                if isinstance(error, RunInterruptedError):
                    # Storage, a node or Ray failed, and would fail again. A night without a folder gets no record:
                    # perhaps it has no images.
                    skipped = [day for day in dates if day < date]
                    reason = f"not looked at, because {date} was interrupted: {problem}"
                    problems |= dict.fromkeys(known.intersection(skipped), reason)
                    if skipped:
                        log.warning(f"{join_first(list(map(str, skipped)), separator=', ')}: {reason}")
                    break
    return problems


def _remove_rows(job: NightlyJob, folder: NightFolder) -> None:
    """Remove the night's rows. First replace its record, even a damaged one, so that it no longer counts them.

    Raises:
        DataError: if there are rows, and no image or no model to make them again: they stay.
    """
    if folder.outputs():
        kept = "--fresh left the rows as they are"
        categories = {name for rows in _list_images(job, folder.date) for name in rows["category"].unique().to_pylist()}
        if not categories:
            raise DataError(f"there are no images in {', '.join(job.sources(folder.date))}: {kept}")
        try:
            read_models(job.store, sorted(categories))
        except ModelError as error:
            raise DataError(f"{error}: {kept}") from error
    if storage.exists(folder.record):
        folder.write(job.empty_night(folder.date))
    folder.remove_runs()


def _runs_to_score(job: NightlyJob, folder: NightFolder) -> Iterator[ScoringRun]:
    """Yield the night's unfinished runs, and then a new one if there are images that no run has.

    Score each run before taking the next one: scoring fixes its list of images.
    """
    for output in folder.outputs():
        if not output.state.record.config:
            # Its removal was cut off.
            output.remove()
    for output in folder.manifests():
        if not output.state.is_finished():
            # A run without rows starts over if its options were changed: then its list of images is made anew.
            yield _scoring_run(job, folder, output, partial(_new_images, job, folder, output))
    rows = _new_images(job, folder)
    if first := next(rows, None):
        number = max((int(output.name) for output in folder.manifests()), default=0) + 1
        yield _scoring_run(job, folder, folder.output(number), lambda: chain([first], rows))


def _scoring_run(
    job: NightlyJob, folder: NightFolder, output: RunOutput, rows: Callable[[], Iterable[pa.Table]]
) -> ScoringRun:
    images, fenced = job.sources(folder.date), replace(output, fence=job.fence)
    return ScoringRun.of_collection(job.options, images, rows, job.output, job.scoring, job.cluster, fenced)


def _new_images(job: NightlyJob, folder: NightFolder, run: RunOutput | None = None) -> Iterator[pa.Table]:
    """Yield rows of schema MANIFEST for the night's images that are in the list of no run, other than this one."""
    manifests = folder.manifests()
    segments = [each for out, manifest in manifests.items() if out != run for each in manifest.segments(out.manifest)]
    shards = [shard.uri for segment in segments for shard in segment.shards]
    ids = storage.in_parallel(lambda uri: read_shard(uri)["image_id"].to_numpy(), shards)
    listed = np.sort(np.concatenate([np.empty(0, np.int64), *ids]))
    for chunk in _list_images(job, folder.date):
        is_new = ~contains(listed, chunk["image_id"].to_numpy())
        if is_new.any():
            yield chunk.filter(pa.array(is_new))


def _list_images(job: NightlyJob, date: datetime.date) -> Iterator[pa.Table]:
    """Yield rows of schema MANIFEST for all images of a night; a source may have none."""
    rule = CategoryRule(job.options.category, job.options.category_from)
    for source in job.sources(date):
        settle = storage.Settle(job.options.settle)
        try:
            yield from image_rows([source], rule, job.options.allow, settle=settle)
        except NoImagesError as error:
            # The other sources may have some. Of a night before that was never scored, there may never have been any.
            if str(date) == job.options.date or storage.exists(NightFolder.of(job.out, date).uri):
                log.info(str(error))
        if settle.left:
            log.warning(
                f"{source}: left {len(settle.left)} files to the next start, they were modified less than "
                f"{duration(settle.seconds)} ago and may still be being written: {join_first(settle.left)}"
            )
