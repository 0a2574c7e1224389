"""Shards of a manifest: each image once, whole or not there at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stpm import storage
from stpm.errors import ConfigError, DataError
from stpm.scoring.inputs import manifest
from stpm.scoring.inputs.manifest import SeenIds, image_id
from stpm.scoring.schema import MANIFEST, table


def chunk(uris: list[str], category: str = "nut", **own: list[object]) -> pa.Table:
    columns: dict[str, list[object]] = {name: [""] * len(uris) for name in MANIFEST.names}
    columns |= {"image_id": [0] * len(uris), "uri": list(uris), "category": [category] * len(uris)}
    columns |= {"archive_start": [0] * len(uris), "archive_length": [-1] * len(uris)}
    rows = table(columns, MANIFEST)
    for name, values in own.items():
        rows = rows.append_column(name, pa.array(values))
    return rows


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    return f"{tmp_path if request.param == 'local' else memory}/manifest"


def rows_in(folder: str) -> list[dict[str, object]]:
    shards = [pq.read_table(pa.BufferReader(storage.read(uri))) for uri in manifest.shards(folder)]
    return pa.concat_tables(shards, promote_options="default").to_pylist()


def test_doubles_are_left_out_and_counted_within_and_across_chunks(folder: str) -> None:
    written = manifest.write([chunk(["a", "b", "a"]), chunk(["b", "c"], "bolt"), chunk(["a"])], folder)
    assert (written.rows, written.doubles, written.categories) == (3, 3, ("bolt", "nut"))
    assert manifest.read(folder) == written
    assert [row["uri"] for row in rows_in(folder)] == ["a", "b", "c"]
    assert all(row["image_id"] == image_id(str(row["uri"])) for row in rows_in(folder))


def test_an_attempt_that_was_cut_off_does_not_count(folder: str) -> None:
    def cut_off() -> Iterator[pa.Table]:
        yield chunk(["old"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        manifest.write(cut_off(), folder)
    assert manifest.read(folder) is None
    manifest.write([chunk(["new"])], folder)
    assert [row["uri"] for row in rows_in(folder)] == ["new"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_a_damaged_manifest_is_said(folder: str, content: bytes) -> None:
    manifest.write([chunk(["a"])], folder)
    storage.publish(f"{folder}/manifest.json", content)
    with pytest.raises(DataError, match=r"manifest/manifest\.json is damaged, .* or --fresh"):
        manifest.read(folder)


def test_the_digest_is_of_the_rows(folder: str) -> None:
    first = manifest.write([chunk(["a", "b"])], folder).digest
    assert manifest.write([chunk(["a", "b"])], folder).digest == first
    assert manifest.write([chunk(["a", "c"])], folder).digest != first


def test_own_columns_are_kept_and_must_agree(folder: str) -> None:
    manifest.write([chunk(["a"]), chunk(["b"], line=[7]), chunk(["c"], shift=["x"])], folder)
    shards = [pq.read_table(pa.BufferReader(storage.read(uri))) for uri in manifest.shards(folder)]
    assert all(shard.schema.names == [*MANIFEST.names, "line", "shift"] for shard in shards)
    assert [(row["line"], row["shift"]) for row in rows_in(folder)] == [(None, None), (7, None), (None, "x")]
    with pytest.raises(ConfigError, match="column line is int64 in one manifest and string in another"):
        manifest.write([chunk(["a"], line=[7]), chunk(["b"], line=["7"])], folder)


def test_no_rows_are_a_manifest_too(folder: str) -> None:
    assert manifest.write([], folder).rows == 0
    assert manifest.shards(folder) == []


@given(st.lists(st.lists(st.integers(-50, 50), max_size=30), max_size=12))
def test_seen_ids_are_a_set(chunks: list[list[int]]) -> None:
    ours, theirs = SeenIds(), set()
    for ids in chunks:
        expected = []
        for i in ids:
            expected.append(i not in theirs)
            theirs.add(i)
        assert ours.add(np.array(ids, np.int64)).tolist() == expected
