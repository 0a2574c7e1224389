"""Bring the records of several nights up to date, the oldest first."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from stpm.errors import ConfigError, DataError, with_remedy
from stpm.models.store import ModelStore
from stpm.monitoring.judging import EARLIER
from stpm.monitoring.night_folder import NightFolder
from stpm.monitoring.night_record import make_record
from stpm.monitoring.nights import Night, read_night, write_night
from stpm.monitoring.score_nights import NightlyJob
from stpm.names import as_utf8

log = logging.getLogger(__name__)


def update_records(
    job: NightlyJob, dates: Sequence[datetime.date], problems: Mapping[datetime.date, str]
) -> dict[datetime.date, Night]:
    """Bring the records of these nights, oldest first, up to date; return all records that matter, by date."""
    count = max(job.monitoring.nights, EARLIER)
    folders = NightFolder.find_all(job.out)
    before = [folder for folder in folders if folder.date < dates[0]][-count:]
    nights = _read({*before, *(folder for folder in folders[-count:] if folder.date not in dates)})
    for date in dates:
        folder = NightFolder.of(job.out, date)
        if folder not in folders and date != dates[-1] and date not in problems:
            continue
        earlier = [nights[day] for day in sorted(nights) if day < date][-count:]
        try:
            with with_remedy(folder.how_to_start_over()):
                nights[date] = night = _update_record(job, folder, earlier, problems.get(date, ""))
            # Write no record for a day without images: --date may be mistyped.
            if folder in folders or night.categories or night.problem:
                write_night(folder, night)
        except (ConfigError, DataError, OSError) as error:
            # Storage failed, or the record or a file of the runs is damaged: keep the record.
            nights[date] = Night(date.isoformat(), job.sources(date), problem=as_utf8(str(error)))
            log.error(f"{date}: {nights[date].problem}")
    return nights


def _update_record(job: NightlyJob, folder: NightFolder, earlier: Sequence[Night], problem: str) -> Night:
    """Return the night's record, made anew if rows were added since it was written or it was not judged."""
    night = read_night(folder)
    names = tuple(output.name for output in folder.manifests())
    if night and night.is_judged and night.runs == names and night.fdr == job.monitoring.fdr:
        return replace(night, problem=problem)
    night = Night(folder.date.isoformat(), job.sources(folder.date), problem=problem)
    store = ModelStore(job.options.models)
    return make_record(folder, night, earlier, store, job.monitoring, job.scoring.false_alarm_rate)


def _read(folders: Iterable[NightFolder]) -> dict[datetime.date, Night]:
    nights = {}
    for folder in folders:
        try:
            if night := read_night(folder):
                nights[folder.date] = night
        except (DataError, OSError) as error:
            log.warning(f"{as_utf8(str(error))}; the page leaves this night out")
    return nights
