from __future__ import annotations

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from stpm.scoring.inputs.manifest import Shard
from stpm.scoring.inputs.manifest_blocks import divide_evenly


@given(st.lists(st.integers(0, 40), max_size=10), st.integers(1, 30))
def test_rows_are_divided_evenly_in_their_order(lengths: list[int], max_rows: int) -> None:
    shards = [Shard(f"{number}.parquet", rows) for number, rows in enumerate(lengths)]
    parts = divide_evenly(shards, max_rows)
    rows = [[(uri, row) for uri, start, stop in part for row in range(start, stop)] for part in parts]
    assert list(chain.from_iterable(rows)) == [(uri, row) for uri, length in shards for row in range(length)]
    assert len(parts) == -(-sum(lengths) // max_rows)
    if parts:
        sizes = [len(part) for part in rows]
        assert max(sizes) <= max_rows
        assert max(sizes) - min(sizes) <= 1
