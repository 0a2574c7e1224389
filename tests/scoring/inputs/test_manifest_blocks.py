from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from stpm import storage
from stpm.data.image_files import ImageRef
from stpm.scoring.inputs.manifest import ManifestRow, Shard, make_rows
from stpm.scoring.inputs.manifest_blocks import ManifestBlocks, divide_evenly


@given(st.lists(st.integers(0, 40), max_size=10), st.integers(1, 30))
def test_rows_are_divided_evenly_in_their_order(lengths: list[int], max_rows: int) -> None:
    shards = [Shard(f"{number}.parquet", rows) for number, rows in enumerate(lengths)]
    parts = divide_evenly(shards, max_rows)
    rows = [[(s.uri, row) for s, inside in part for row in range(inside.start, inside.stop)] for part in parts]
    assert list(chain.from_iterable(rows)) == [(uri, row) for uri, length, _ in shards for row in range(length)]
    assert len(parts) == -(-sum(lengths) // max_rows)
    if parts:
        sizes = [len(part) for part in rows]
        assert max(sizes) <= max_rows
        assert max(sizes) - min(sizes) <= 1


def test_rows_are_ordered_by_category_but_those_of_parquet_files_stay_together(memory: str) -> None:
    found = [("b", 0, -1), ("p", 7, 1), ("a", 512, 90), ("b", 0, -1), ("o", 8, 1), ("a", 0, -1), ("p", 9, 1)]
    rows = [
        ManifestRow(ImageRef(f"{number}", start, length), category)
        for number, (category, start, length) in enumerate(found)
    ]
    storage.publish(f"{memory}/0", storage.encode_parquet(make_rows(rows)))
    (task,) = ManifestBlocks([Shard(f"{memory}/0", len(rows))]).get_read_tasks(1)
    (ordered,) = task.read_fn()
    assert ordered["uri"].to_pylist() == list("1462503")
