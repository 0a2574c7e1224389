"""Score several nights, the latest first.

A problem with one night does not stop the others, unless storage, a node or Ray failed while it was scored: then the
earlier nights wait for the next start.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import pyarrow as pa

from stpm import storage
from stpm.cluster.connection import connected
from stpm.errors import ConfigError, CutOffError, DataError, ModelError, NoImagesError, join_first, with_remedy
from stpm.lease import Fence
from stpm.method.calibration import warn_about_few_good_images
from stpm.models.store import ModelStore
from stpm.monitoring.night_folder import NightFolder
from stpm.monitoring.nights import Night, read_night, write_night
from stpm.monitoring.options import MonitoringOptions, NightlyOptions
from stpm.monitoring.runs import runs_to_score
from stpm.names import as_utf8
from stpm.options import ClusterOptions
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.sources import image_rows
from stpm.scoring.options import OutputOptions, ScoreOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.resume import read_models
from stpm.scoring.run import run_scoring
from stpm.scoring.run_state import ScoringConfig
from stpm.scoring.scoring_run import ScoringRun
from stpm.times import duration

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NightlyJob:
    """The options of the job, and how they apply to each night."""

    options: NightlyOptions
    monitoring: MonitoringOptions
    output: OutputOptions
    scoring: ScoreOptions
    cluster: ClusterOptions
    out: str
    fence: Fence | None = None

    def sources(self, date: datetime.date) -> tuple[str, ...]:
        """Return the absolute URIs of a night's images."""
        return tuple(map(storage.absolute, self.options.sources(date)))

    def score(self, folder: NightFolder, connection: ExitStack, *, fresh: bool = False) -> None:
        """Score the night's images that have no row.

        Args:
            folder: of the night.
            connection: receives the connection to Ray, which is made once there is an image to score.
            fresh: start over.

        Raises:
            DataError: if there is no image, or no model, to start over with: the rows stay.
        """
        list_images = partial(self._list_images, folder.date)
        if fresh:
            if folder.outputs():
                self._check_replacement(folder.date)
            self._start_over(folder)
        for output, rows in runs_to_score(folder, list_images):
            self._score_run(folder, output, rows, connection)

    def _check_replacement(self, date: datetime.date) -> None:
        """Raise DataError unless the night's rows could be made again: list all images, and read their models."""
        categories = {name for rows in self._list_images(date) for name in rows["category"].unique().to_pylist()}
        kept = "--fresh left the rows as they are"
        if not categories:
            raise DataError(f"there are no images in {', '.join(self.sources(date))}: {kept}")
        try:
            read_models(ModelStore(self.options.models), categories)
        except ModelError as error:
            raise DataError(f"{error}: {kept}") from error

    def _start_over(self, folder: NightFolder) -> None:
        """Remove the night's rows. First replace its record, even a damaged one, so that it no longer counts them."""
        if storage.exists(folder.record):
            write_night(folder, Night(folder.date.isoformat(), self.sources(folder.date)))
        folder.remove_runs()

    def _output_options(self, folder: NightFolder) -> OutputOptions:
        """Return how to write a run's rows: partitioned as the night's first run did, for all runs are one table."""
        for output in folder.outputs()[:1]:
            if partition_by := output.state.partition_by():
                return replace(self.output, partition_by=partition_by)
        return self.output

    def _list_images(self, date: datetime.date) -> Iterator[pa.Table]:
        """Yield tables of schema MANIFEST that list a night's images; a source may have none."""
        rule = CategoryRule(self.options.category, self.options.category_from)
        for source in self.sources(date):
            settle = storage.Settle(self.options.settle)
            try:
                yield from image_rows([source], rule, self.options.allow, settle=settle)
            except NoImagesError as error:
                # The other sources may have some.
                log.info(str(error))
            if settle.left:
                log.warning(
                    f"{source}: left {len(settle.left)} files to the next start, they were modified less than "
                    f"{duration(settle.seconds)} ago and may still be being written: {join_first(settle.left)}"
                )

    def _score_run(
        self, folder: NightFolder, output: RunOutput, rows: Iterable[pa.Table], connection: ExitStack
    ) -> None:
        """Score one run; `rows` become its manifest, if it has none yet."""
        sources = self.sources(folder.date)
        if not read_night(folder):
            # The record shows that this job wrote the folder; --keep-days removes no other.
            write_night(folder, Night(folder.date.isoformat(), sources))
        connection.enter_context(connected())
        log.info(f"{folder.date}, run {output.name}: scoring into {folder.uri}")
        config = ScoringConfig(
            images=sources,
            false_alarm_rate=self.scoring.false_alarm_rate,
            output=self._output_options(folder),
            category=self.options.category,
            category_from=self.options.category_from,
            allow=tuple(self.options.allow),
        )
        run = ScoringRun(
            rows=lambda: rows,
            config=config,
            store=ModelStore(self.options.models),
            options=self.scoring,
            output=replace(output, fence=self.fence),
            triage_images=self.monitoring.top,
            cluster=self.cluster,
        )
        _, models = run_scoring(run)
        counts = {name: (each.good_count, each.fit.calibration_count) for name, each in models.items()}
        warn_about_few_good_images(counts, config.false_alarm_rate)


def score_nights(job: NightlyJob, dates: Sequence[datetime.date]) -> dict[datetime.date, str]:
    """Score what is new in each night, and return the problems by date."""
    known = {folder.date for folder in NightFolder.find_all(job.out)}
    problems = {}
    with ExitStack() as connection:
        for date in dates:
            folder = NightFolder.of(job.out, date)
            try:
                with with_remedy(folder.how_to_start_over()):
                    job.score(folder, connection, fresh=job.options.fresh and date == dates[0])
            except (ConfigError, CutOffError, DataError, ModelError, OSError) as error:
                problem = as_utf8(str(error))
                problems[date] = problem
                log.error(f"{date}: {problem}")
                if isinstance(error, CutOffError):
                    # Storage, a node or Ray failed, and would fail again.
                    skipped = [day for day in dates if day < date]
                    reason = f"not looked at, because {date} was cut off: {problem}"
                    problems |= dict.fromkeys((day for day in skipped if day in known), reason)
                    # A night without a folder gets no record: perhaps it has no images.
                    if missed := [str(day) for day in skipped if day not in known]:
                        log.warning(f"{join_first(missed, separator=', ')}: {reason}")
                    break
    return problems
