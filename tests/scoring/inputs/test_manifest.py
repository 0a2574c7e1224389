from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stpm import storage
from stpm.data.image_files import ImageRef
from stpm.errors import ConfigError, RunDamagedError
from stpm.scoring.inputs import manifest
from stpm.scoring.inputs.manifest import ManifestRow, image_id, make_rows, read_manifest, write_manifest
from stpm.scoring.schema import MANIFEST, with_passthrough


def chunk(uris: list[str], category: str = "nut", **own: list[object]) -> pa.Table:
    return with_passthrough(make_rows([ManifestRow(ImageRef(uri), category) for uri in uris]), pa.table(own))


@pytest.fixture
def folder(root: str) -> str:
    return f"{root}/manifest"


def read_shards(folder: str) -> list[pa.Table]:
    """Read all shards in the folder of a manifest."""
    return [storage.read_table(uri) for uri in storage.files(folder) if uri.endswith(".parquet")]


def rows_in(folder: str) -> list[dict[str, object]]:
    return pa.concat_tables(read_shards(folder), promote_options="default").to_pylist()


def test_duplicates_are_left_out_and_counted_within_and_across_chunks(folder: str) -> None:
    written = write_manifest([chunk(["a", "b", "a"]), chunk(["b", "c"], "bolt"), chunk(["a"])], folder)
    assert (written.rows, written.duplicates, written.categories) == (3, 3, {"bolt": 1, "nut": 2})
    assert read_manifest(folder) == written
    assert [row["uri"] for row in rows_in(folder)] == ["a", "b", "c"]
    assert all(row["image_id"] == image_id(str(row["uri"])) for row in rows_in(folder))


def test_an_unfinished_manifest_does_not_count(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def cut_off() -> Iterator[pa.Table]:
        yield chunk(["old"])
        # A killed process would leave no ids on the disk.
        assert list(temporary.iterdir()) == []
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_manifest(cut_off(), folder)
    assert read_manifest(folder) is None
    write_manifest([chunk(["new"])], folder)
    assert [row["uri"] for row in rows_in(folder)] == ["new"]


@pytest.mark.parametrize(
    "change",
    # The last three contradict the rest.
    [None, {"rows": None}, {"categories": []}, {"categories": {}}, {"rows": 3}, {"rows": 10**30}],
)
def test_an_error_names_a_damaged_manifest(folder: str, change: dict[str, object] | None) -> None:
    written = write_manifest([chunk(["a", "b"])], folder)
    content = json.dumps(dataclasses.asdict(written) | change).encode() if change else b""
    storage.publish(f"{folder}/manifest.json", content)
    with pytest.raises(RunDamagedError, match=r"manifest/manifest\.json is damaged, .*$"):
        read_manifest(folder)


@pytest.mark.parametrize("segment_rows", [1, 9])
def test_passthrough_columns_are_kept_and_must_agree(folder: str, segment_rows: int) -> None:
    chunks = [chunk(["a"]), chunk(["b"], line=[7], shift=[None]), chunk(["c"], line=[None], shift=["x"])]
    write_manifest(chunks, folder, segment_rows=segment_rows)
    shards = read_shards(folder)
    assert all(shard.schema.names == [*MANIFEST.names, "line", "shift"] for shard in shards)
    # A column of nulls alone has no type of its own.
    assert all(shard.schema.types[-2:] == [pa.int64(), pa.string()] for shard in shards)
    assert [(row["line"], row["shift"]) for row in rows_in(folder)] == [(None, None), (7, None), (None, "x")]
    with pytest.raises(ConfigError, match="column line is int64 in one table and string in another"):
        write_manifest([chunk(["a"], line=[7]), chunk(["b"], line=["7"])], folder)


@given(st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=8), st.integers(1, 12), st.integers(1, 5))
def test_segments_have_each_row_once_and_their_size(
    chunks: list[list[int]], segment_rows: int, shard_rows: int
) -> None:
    fsspec.filesystem("memory").store.clear()
    tables = [chunk([f"{i}.png" for i in ids]) for ids in chunks]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "SHARD_ROWS", shard_rows)
        written = write_manifest(tables, "memory://list", segment_rows=segment_rows)
        segments = written.segments("memory://list")
    found = []
    for number, segment in enumerate(segments):
        assert segment.number == number
        assert 0 < segment.rows <= segment_rows
        for uri, rows, _ in segment.shards:
            uris = storage.read_table(uri)["uri"].to_pylist()
            assert len(uris) == rows
            found += uris
    distinct = dict.fromkeys(f"{i}.png" for ids in chunks for i in ids)
    assert found == list(distinct)
    assert written.rows == len(distinct)
    shards = [uri for segment in segments for uri, *_ in segment.shards]
    assert storage.files("memory://list") == [*shards, "memory://list/manifest.json"]


def test_image_ids_are_stable() -> None:
    assert image_id("s3://bucket/a.png") == -520363251256440237
