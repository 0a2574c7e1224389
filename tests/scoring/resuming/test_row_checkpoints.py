from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.data.checkpoint.util import build_pending_checkpoint_trie

from stpm.scoring.resuming.row_checkpoints import FileNames


@pytest.mark.parametrize("cut_off", [0, 10, 99_999, 100_000, 999_999])
def test_no_file_name_of_a_write_task_is_a_prefix_of_another_tasks(cut_off: int) -> None:
    """Ray removes the files whose names begin with that of a task whose checkpoint is pending."""
    names = FileNames("scores")
    pending = names.get_filename_for_task("uuid", cut_off).removesuffix(".parquet")
    trie = build_pending_checkpoint_trie([SimpleNamespace(path=f"x/{pending}.pending.parquet")], ".pending.parquet")
    for task in {cut_off * 10**power + rest for power in range(4) for rest in (0, 1, 9)}:
        written = names.get_filename_for_task("uuid", task).replace(".parquet", "-0.parquet")
        assert trie.has_prefix_of(written) == (task == cut_off), (pending, written)
