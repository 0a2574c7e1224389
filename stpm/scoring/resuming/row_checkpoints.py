"""Ray Data's checkpoint: each row's id is written down with the row, so that a killed pass goes on.

Its configuration travels with every task of the pass, and the process that runs one imports the module that defines its
class: this one, which knows no torch.
"""

from __future__ import annotations

from typing import Any

from ray.data.checkpoint import CheckpointConfig, CheckpointManager
from ray.data.datasource import FilenameProvider

from stpm import storage


def checkpoints(folder: str) -> CheckpointConfig:
    """For data sets that write down in a folder the ids of the rows that they have written."""
    filesystem, path = storage.arrow_filesystem(folder)
    return CheckpointConfig(
        id_column="image_id",
        checkpoint_path=path,
        override_filesystem=filesystem,
        delete_checkpoint_on_success=False,
        checkpoint_manager_cls=CleaningManager,
    )


class FileNames(FilenameProvider):  # type: ignore[misc]
    """Names of the files of rows, of which none is the beginning of another.

    Of a write task that was cut off Ray removes all files whose names begin with the task's. Its own names are padded
    to six digits: task 100000's is the beginning of task 1000000's.

    Args:
        name: of the pass.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, "parquet")

    def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
        return f"{self.dataset_uuid}_{write_uuid}_{task_index:012}.{self.file_format}"


class CleaningManager(CheckpointManager):  # type: ignore[misc]
    """Ray's clean-up of what writers left half done, without its filter: the rows that come in are those left."""

    def load_checkpoint(self, data_file_dir: Any = None, data_file_filesystem: Any = None) -> tuple[None, int]:
        if data_file_dir is not None:
            self._clean_pending_checkpoints(data_file_dir, data_file_filesystem)
        return None, 0
