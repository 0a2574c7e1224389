"""Tables of a user become manifest rows."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stpm.errors import ConfigError, DataError
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.manifest import SHARD_ROWS
from stpm.scoring.inputs.sources import image_rows
from tests.scoring.inputs.helpers import NUT, rows, write_table


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_passthrough_columns_are_kept(root: str, kind: str) -> None:
    records: list[dict[str, object]] = [
        {"uri": "images/b.png", "category": "bolt", "line": 3, "label": "good"},
        {"uri": f"{root}/images/a.JPG", "category": "", "line": 4, "label": "scratch"},
    ]
    write_table(f"{root}/list.{kind}", records)
    first, second = rows(f"{root}/list.{kind}")
    line = 3 if kind == "parquet" else "3"
    assert (first["uri"], first["category"], first["line"]) == (f"{root}/images/b.png", "bolt", line)
    # The rule gives the category if the table does not.
    assert (second["uri"], second["category"], second["label"]) == (f"{root}/images/a.JPG", "nut", "scratch")
    assert all(row["error_kind"] == "" for row in (first, second))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_values_of_text_files_stay_text(tmp_path: Path, kind: str) -> None:
    own = {"serial": "00123", "day": "2024-01-01", "at": "2024-01-01T10:00:00Z", "yes": "true", "size": "1e3"}
    # A reader that guesses types from the first rows would not see text in this column.
    records = [{"uri": f"{i}.png", "category": "007", **own, "note": ""} for i in range(30_000)]
    records[-1]["note"] = "a 7"
    write_table(f"{tmp_path}/list.{kind}", records)
    found = rows(f"{tmp_path}/list.{kind}", rule=CategoryRule())
    assert len(found) == 30_000
    assert {name: found[0][name] for name in ("category", *own)} == {"category": "007", **own}
    assert (found[0]["note"], found[-1]["note"]) == ("", "a 7")


def test_json_values_become_their_own_text(tmp_path: Path) -> None:
    lines = [
        '{"uri": "a.png", "category": 7, "n": 1.50, "id": 12345678901234567890, "ok": true, "of": {"a": [1, null]}}',
        "",
        '{"category": "7", "new": "x", "n": null}',
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    first, second = rows(f"{tmp_path}/list.jsonl")
    assert (first["category"], first["n"], first["id"], first["ok"]) == ("7", "1.50", "12345678901234567890", "true")
    assert (first["of"], first["new"], second["new"], second["n"]) == ('{"a": [1, null]}', None, "x", None)
    assert (second["uri"], second["error_kind"]) == (f"{tmp_path}/list.jsonl#1", "missing")


@pytest.mark.parametrize("name", ["image_id", "error_kind", "error_message", "archive_start", "Score", "URI", "Label"])
def test_an_error_names_a_reserved_column(tmp_path: Path, name: str) -> None:
    write_table(f"{tmp_path}/a.csv", [{"uri": "a.png", name: 1}])
    with pytest.raises(ConfigError, match=f"column {name} is one that scoring writes itself"):
        rows(f"{tmp_path}/a.csv")


def test_an_error_names_a_table_that_cannot_be_read(tmp_path: Path) -> None:
    write_table(f"{tmp_path}/a.csv", [{"path": "a.png"}])
    with pytest.raises(DataError, match="no column `uri`, nor images in a column image or bytes; its columns are path"):
        rows(f"{tmp_path}/a.csv")
    pq.write_table(pa.table({"image": ["a.png"], "x": [1]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"no column `uri`, nor images in a column image or bytes; its columns are im"):
        rows(f"{tmp_path}/t.parquet")
    broken = {"twice.csv": "uri,a,a\nx.png,1,2", "short.csv": "uri,a\nx.png", "latin.csv": "uri\ncaf\xe9.png"}
    broken |= {"a.jsonl": "[1]", "b.jsonl": '{"uri": "a.png"}\n{"uri": ', "c.jsonl": "[" * 100_000}
    for name, text in broken.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(DataError, match=f"{name}: this table cannot be read: "):
            rows(f"{tmp_path}/{name}")
    pq.write_table(pa.table({"uri": ["a.png"], "label": [{"a": 1}]}), tmp_path / "s.parquet")
    with pytest.raises(DataError, match=r"s\.parquet: this table cannot be read: .*cast"):
        rows(f"{tmp_path}/s.parquet")
    foreign = pa.array([b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"uri": ["a.png"], "note": foreign}), tmp_path / "u.parquet")
    with pytest.raises(DataError, match=r"u\.parquet: this table cannot be read: .*UTF8"):
        rows(f"{tmp_path}/u.parquet")
    pq.write_table(pa.table({"uri": pa.array([], pa.string())}), tmp_path / "e.parquet")
    with pytest.raises(DataError, match=r"e\.parquet: this table has no rows"):
        rows(f"{tmp_path}/e.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"c\.parquet: this table cannot be read"):
        rows(f"{tmp_path}/c.parquet")
    with pytest.raises(DataError, match=r"d\.parquet: this table cannot be read"):
        rows(f"{tmp_path}/d.parquet")


def test_a_large_table_is_read_in_parts(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": [f"{i}.png" for i in range(25_000)]}), tmp_path / "m.parquet")
    counts = [part.num_rows for part in image_rows([f"{tmp_path}/m.parquet"], NUT)]
    assert max(counts) <= SHARD_ROWS
    assert sum(counts) == 25_000
    pq.write_table(pa.table({"image": [b""] * 10_000}), tmp_path / "images.parquet")
    found = pa.concat_tables(image_rows([f"{tmp_path}/images.parquet"], NUT))
    assert found["archive_start"].to_pylist() == list(range(10_000))


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_stored_listing_of_a_bucket_names_its_images(root: str, kind: str) -> None:
    keys = ["a.png", "dir/b c.JPG", "dir/", "notes.txt", "é.png"]
    records = [{"bucket": "plant", "key": key, "size": number} for number, key in enumerate(keys)]
    write_table(f"{root}/inventory.{kind}", records)
    scheme = "memory" if root.startswith("memory") else "s3"
    images = [f"{scheme}://plant/{key}" for key in ("a.png", "dir/b c.JPG", "é.png")]
    found = rows(f"{root}/inventory.{kind}", allow=[f"{scheme}://plant"])
    assert [row["uri"] for row in found] == images
    assert all(row["error_kind"] == "" and "size" not in row for row in found)
    # As any table, it may name only what is allowed.
    assert {row["error_kind"] for row in rows(f"{root}/inventory.{kind}")} == {"not_allowed"}
    write_table(f"{root}/empty.{kind}", records[2:4])
    with pytest.raises(DataError, match="this table names no images"):
        rows(f"{root}/empty.{kind}")


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_stored_listing_of_versions_names_the_latest_that_are_not_deleted(tmp_path: Path, kind: str) -> None:
    objects = [("a.png", True, False), ("a.png", False, False), ("gone.png", True, True), ("gone.png", False, False)]
    columns = ("key", "is_latest", "is_delete_marker")
    records = [{"bucket": "plant", **dict(zip(columns, each, strict=True))} for each in objects]
    write_table(f"{tmp_path}/inventory.{kind}", records)
    assert [row["uri"] for row in rows(f"{tmp_path}/inventory.{kind}", allow=["s3://plant"])] == ["s3://plant/a.png"]


def test_a_table_of_images_may_have_the_columns_of_a_listing(tmp_path: Path) -> None:
    table = {"image": [b"x", b"y"], "bucket": ["line 1", "line 2"], "key": ["k1", "a.png"]}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    found = rows(f"{tmp_path}/t.parquet")
    assert [(row["error_kind"], row["bucket"], row["key"]) for row in found] == [
        ("", "line 1", "k1"),
        ("", "line 2", "a.png"),
    ]
