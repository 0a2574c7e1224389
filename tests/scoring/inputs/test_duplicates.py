from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stpm.scoring.inputs.duplicates import DuplicateFinder


def test_a_killed_process_leaves_no_ids_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with DuplicateFinder() as finder:
        finder.add(np.arange(10_000))
        assert list(tmp_path.iterdir()) == []


@given(st.lists(st.lists(st.integers(-50, 50), max_size=30), max_size=12))
def test_each_id_is_found_but_its_first_row(chunks: list[list[int]]) -> None:
    rows = [i for ids in chunks for i in ids]
    with DuplicateFinder() as finder:
        for ids in chunks:
            finder.add(np.array(ids, np.int64))
        expected = [i in rows[:number] for number, i in enumerate(rows)]
        for start in (0, 3, len(rows) // 2):
            assert finder.mask(start, len(rows)).tolist() == expected[start:]
