"""Remove nights that are older than they have to be kept: what runs of the job wrote there, and nothing else."""

from __future__ import annotations

import datetime
import logging

from stpm import storage
from stpm.errors import DataError
from stpm.monitoring.nights import read_night, remove_record
from stpm.monitoring.runs import NightFolder

log = logging.getLogger(__name__)


def remove_nights_before(out: str, date: datetime.date) -> None:
    """Remove the nights before a date: a folder is one if its record, night.json, has the date of its name.

    Times of files and of this machine do not matter. The record goes last, so that the next start goes on after a kill.

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
            log.info(f"warning: {folder.uri} is not removed: {error}")
            continue
        if not night:
            continue
        folder.remove_runs()
        remove_record(folder)
        storage.sweep(folder.uri)
        storage.remove_empty_folders(folder.uri)
        kept = storage.files(folder.uri)
        log.info(f"removed the night {night.date}{f', but not {len(kept)} files that no run wrote' if kept else ''}")
