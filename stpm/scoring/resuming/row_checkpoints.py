"""Ray Data's row checkpoints: files with the ids of the written rows, so that a killed run can be resumed.

A task that writes rows makes one checkpoint. It writes their ids to a file with a pending name, then the rows, then
their summary, and commits all of them by renaming the file of ids. The next run removes what a killed task left.

Every task imports this module to read its configuration: no torch here.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from ray.data.checkpoint import CheckpointConfig, CheckpointManager

from stpm import storage

_PENDING = ".pending.parquet"
_IDS = ".parquet"
_SUMMARY = ".json"
# Ray adds it to the task's name in the name of a file of rows.
_FILE_NUMBER = re.compile(r"-\d+$")


def checkpoint_config(folder: str) -> CheckpointConfig:
    """Configure Ray Data to record the ids of written rows in a folder."""
    filesystem, path = storage.arrow_filesystem(folder)
    return CheckpointConfig(
        id_column="image_id",
        checkpoint_path=path,
        override_filesystem=filesystem,
        delete_checkpoint_on_success=False,
        checkpoint_manager_cls=PendingCheckpointCleaner,
    )


def committed_checkpoints(folder: str) -> list[str]:
    """List the checkpoints whose rows are written.

    Ray commits a checkpoint by renaming it. A store without renames copies the file and removes the original. If this
    was cut off, both names exist and the rows are written: remove the pending one.
    """
    uris = [uri for uri in storage.files(folder) if uri.endswith(_IDS)]
    pending = {uri for uri in uris if uri.endswith(_PENDING)}
    committed = [uri for uri in uris if uri not in pending]
    for uri in committed:
        if (copied_from := uri.removesuffix(_IDS) + _PENDING) in pending:
            storage.remove(copied_from)
    return committed


def summary_of(checkpoint: str) -> str:
    """Return the URI of the summary of a checkpoint's rows."""
    return checkpoint.removesuffix(_IDS) + _SUMMARY


def task_of(uri: str) -> str:
    """Return the name of the task that wrote a checkpoint, or a file of rows, to whose name Ray adds a number."""
    return _FILE_NUMBER.sub("", PurePosixPath(uri).name.removesuffix(_IDS))


class PendingCheckpointCleaner(CheckpointManager):  # type: ignore[misc]
    """Remove what killed tasks left, as Ray does, and filter no rows: the input has only those that remain."""

    def load_checkpoint(self, data_file_dir: Any = None, data_file_filesystem: Any = None) -> tuple[None, int]:
        """Clean up, and return no ids."""
        if data_file_dir is not None:
            self._clean_pending_checkpoints(data_file_dir, data_file_filesystem)
        return None, 0
