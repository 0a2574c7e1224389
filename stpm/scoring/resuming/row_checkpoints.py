"""Ray Data's row checkpoints: files with the ids of the written rows, so that a killed run can be resumed.

A task that writes rows makes one checkpoint. It writes their ids to a file with a pending name, then the rows, then
their summary, and commits all of them by renaming the file of ids.

Each attempt has a folder of its own for the checkpoints of each segment. It first adds up those of the attempt before
it, as they are then, in one checkpoint of its own, and records in run.json that its folders count from now on. What a
process of an earlier attempt commits after that, one that was suspended and wakes up, is in a folder that nobody reads.

Every task imports this module to read its configuration: no torch here.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from ray.data.checkpoint import CheckpointConfig, CheckpointManager

from stpm import storage
from stpm.errors import RunDamagedError
from stpm.scoring.row_summary import RowSummary

_PENDING = ".pending.parquet"
_IDS = ".parquet"
_SUMMARY = ".json"
# Ray adds it to the task's name in the name of a file of rows.
_FILE_NUMBER = re.compile(r"-\d+$")
# The end of the name of a task that writes rows, after the name of the run: attempt, execution, number.
_TASK = re.compile(r"(\d+)_[0-9a-f]{32}_\d+")


def checkpoint_config(folder: str) -> CheckpointConfig:
    """Configure Ray Data to record the ids of written rows in a folder."""
    filesystem, path = storage.arrow_filesystem(folder)
    return CheckpointConfig(
        id_column="image_id",
        checkpoint_path=path,
        override_filesystem=filesystem,
        delete_checkpoint_on_success=False,
        checkpoint_manager_cls=NoFilter,
    )


def committed_checkpoints(folder: str) -> list[str]:
    """List the checkpoints whose rows are written."""
    return [uri for uri in storage.files(folder) if uri.endswith(_IDS) and not uri.endswith(_PENDING)]


def summary_of(checkpoint: str) -> str:
    """Return the URI of the summary of a checkpoint's rows."""
    return checkpoint.removesuffix(_IDS) + _SUMMARY


def task_of(uri: str) -> str:
    """Return the name of the task that wrote a checkpoint, or a file of rows, to whose name Ray adds a number."""
    return _FILE_NUMBER.sub("", PurePosixPath(uri).name.removesuffix(_IDS))


def read_summary(uri: str) -> RowSummary:
    """Read a summary of rows. Raise RunDamagedError if it is damaged or missing."""
    try:
        return RowSummary.from_json(storage.read(uri))
    except (ValueError, FileNotFoundError) as error:
        raise RunDamagedError(
            f"{uri} is damaged or missing, and with it the counts of written rows ({error})"
        ) from error


def attempt_of(task: str, run: str) -> int | None:
    """Return the number of the attempt that a task of a run belongs to; None if the name is not one of a task."""
    found = _TASK.fullmatch(task.removeprefix(f"{run}_"))
    return int(found[1]) if found else None


class NoFilter(CheckpointManager):  # type: ignore[misc]
    """Filter no rows: the input has only those that remain."""

    def load_checkpoint(self, data_file_dir: Any = None, data_file_filesystem: Any = None) -> tuple[None, int]:
        """Return no ids."""
        return None, 0
