"""Ray Data's row checkpoint: the id of each written row is recorded, so that a killed run can be resumed.

The configuration is sent to every task, which imports this module to read it: no torch here.
"""

from __future__ import annotations

from typing import Any

from ray.data.checkpoint import CheckpointConfig, CheckpointManager
from ray.data.datasource import FilenameProvider

from stpm import storage


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


class FileNames(FilenameProvider):  # type: ignore[misc]
    """Names of the Parquet files, none of which is a prefix of another.

    After a write task was cut off, Ray removes all files whose names begin with the task's. Ray's own names have six
    digits, so the name of task 100000 would be a prefix of that of task 1000000.

    Args:
        name: of the run.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, "parquet")

    def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
        """Return the prefix of the names of a task's files."""
        return f"{self.dataset_uuid}_{write_uuid}_{task_index:012}.{self.file_format}"


class PendingCheckpointCleaner(CheckpointManager):  # type: ignore[misc]
    """Removes what unfinished write tasks left, as Ray does, but filters no rows: the input has only remaining ones."""

    def load_checkpoint(self, data_file_dir: Any = None, data_file_filesystem: Any = None) -> tuple[None, int]:
        """Clean up, and return no ids."""
        if data_file_dir is not None:
            self._clean_pending_checkpoints(data_file_dir, data_file_filesystem)
        return None, 0
