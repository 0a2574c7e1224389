"""Remove old nights: what runs of the job wrote there, and nothing else."""

from __future__ import annotations

import datetime
import logging

from stpm import storage
from stpm.errors import DataError
from stpm.monitoring.night_folder import NightFolder
from stpm.monitoring.nights import read_night

log = logging.getLogger(__name__)


def remove_nights_before(out: str, date: datetime.date) -> None:
    """Remove the nights before a date. A folder is a night if its record, night.json, has the date of its name.

    Times of files and of this machine do not matter. Remove the record last: after a kill, the next start goes on.

    Args:
        out: URI of the folder of all nights.
        date: the first night to keep.
    """
    for folder in NightFolder.find_all(out):
        if folder.date >= date:
            continue
        try:
            night = read_night(folder)
        except DataError as error:
            log.warning(f"{folder.uri} is not removed: {error}")
            continue
        if not night:
            continue
        folder.remove_runs()
        storage.remove(folder.record)
        storage.remove_unfinished(folder.uri)
        storage.remove_empty_folders(folder.uri)
        kept = storage.files(folder.uri)
        left = f"; {len(kept)} files that this job did not write remain" if kept else ""
        log.info(f"removed the night {night.date}{left}")
