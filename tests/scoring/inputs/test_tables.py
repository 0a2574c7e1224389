"""Tables of a user become manifest rows."""

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stpm import storage
from stpm.errors import ConfigError, DataError
from stpm.names import check_no_secret
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


def parquet(**columns: Any) -> bytes:
    return storage.encode_parquet(pa.table(columns))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"path\na.png", "no column `uri`, nor images in a column image or bytes; its columns are path"),
        ("a.parquet", parquet(image=["a.png"], x=[1]), "no column `uri`, nor images in a .*; its columns are image, x"),
        ("twice.csv", b"uri,a,a\nx.png,1,2", "this table cannot be read: "),
        ("short.csv", b"uri,a\nx.png", "this table cannot be read: "),
        ("latin.csv", b"uri\ncaf\xe9.png", "this table cannot be read: "),
        ("a.jsonl", b"[1]", "this table cannot be read: "),
        ("b.jsonl", b'{"uri": "a.png"}\n{"uri": ', "this table cannot be read: "),
        ("d.jsonl", b'{"uri": "a.png"}\n{"uri": "\\ud800"}', "this table .*: line 2 has half of a surrogate pair"),
        ("c.jsonl", b'{"uri": "a.png"}\n' + b"[" * 100_000, "this table cannot be read: line 2: "),
        ("label.parquet", parquet(uri=["a.png"], label=[{"a": 1}]), "this table cannot be read: .*cast"),
        ("u.parquet", parquet(uri=["a"], x=pa.array([b"\xe9"]).view(pa.string())), "this table cannot be read: .*UTF8"),
        ("empty.parquet", parquet(uri=pa.array([], pa.string())), "this table has no rows"),
        ("cut.parquet", b"PAR1 and then nothing", "this table cannot be read"),
        ("gone.parquet", None, "this table cannot be read"),
    ],
)
def test_an_error_names_an_unreadable_table(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: {message}"):
        rows(f"{tmp_path}/{name}")


def test_a_large_table_is_read_in_parts(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": [f"{i}.png" for i in range(25_000)]}), tmp_path / "m.parquet")
    counts = [part.num_rows for part in image_rows([f"{tmp_path}/m.parquet"], NUT)]
    assert max(counts) <= SHARD_ROWS
    assert sum(counts) == 25_000
    # A table of images may have the columns of a listing.
    images = pa.table({name: [value] * 10_000 for name, value in {"image": b"", "bucket": "b", "key": "k"}.items()})
    pq.write_table(images, tmp_path / "images.parquet")
    found = pa.concat_tables(image_rows([f"{tmp_path}/images.parquet"], NUT))
    assert found["archive_start"].to_pylist() == list(range(10_000))
    assert found.select(["bucket", "key"]).equals(images.select(["bucket", "key"]))
    assert set(found["error_kind"].to_pylist()) == {""}


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_stored_listing_of_a_bucket_names_its_latest_images_that_are_not_deleted(root: str, kind: str) -> None:
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
    versions = [("a.png", True, False), ("a.png", False, False), ("gone.png", True, True), ("gone.png", False, False)]
    names = ("key", "is_latest", "is_delete_marker")
    write_table(f"{root}/versions.{kind}", [{"bucket": "plant", **dict(zip(names, v, strict=True))} for v in versions])
    assert [row["uri"] for row in rows(f"{root}/versions.{kind}", allow=[f"{scheme}://plant"])] == images[:1]


# Parts of names of which each means something where URIs are resolved, checked for secrets or compared with prefixes.
PARTS = [
    *("/", "//", ".", "..", "...", ":", "::", "://", "@", "?", "#", "%41", "~", "\n", "\\", "\0", " ", "é", "a"),
    *("s3://plant", "s3://plant/", "s3://", "s3://..", "S3://plant/a", "abfs://box@me.example/", "https://host/"),
    *("B.png", "/plant", "me:secret@", "plant", "x.tar#", "memory://", "memory://root/lists/", "zip::", "http:/"),
    "file:///plant/",
]
NAMES = st.lists(st.sampled_from(PARTS), max_size=6).map("".join) | st.text(max_size=5)
TEXTS = st.text(st.sampled_from("aB/.é"), max_size=3)
RECORDS = st.fixed_dictionaries({"uri": NAMES, "mask": st.just("") | NAMES, "category": TEXTS, "label": TEXTS})
RULES = [NUT, CategoryRule(), CategoryRule(pattern="{category}/{name}"), CategoryRule(pattern="t/{category}.png")]
FOLDER = "memory://root/lists"
ALLOWED = ["/plant", "s3://plant", "s3://plant/a/", "https://host", "abfs://box@me.example", FOLDER]


@given(st.lists(RECORDS, min_size=1), st.sampled_from(RULES), st.sets(st.sampled_from(ALLOWED), min_size=1))
@example([{"uri": "~\0", "mask": "", "category": "", "label": ""}], NUT, {"/plant"})
@example([{"uri": "~\0://", "mask": "", "category": "", "label": ""}], NUT, {"/plant"})
@settings(max_examples=300)
def test_whatever_a_table_names_is_allowed_or_an_error(
    records: list[dict[str, str]], rule: CategoryRule, allow: set[str]
) -> None:
    storage.publish(f"{FOLDER}/m.jsonl", "\n".join(map(json.dumps, records)).encode())
    found = rows(f"{FOLDER}/m.jsonl", rule=rule, allow=sorted(allow))
    assert len(found) == len(records)
    for row, record in zip(found, records, strict=True):
        assert row["label"] == record["label"]
        is_relative = "://" not in record["uri"] and not record["uri"].startswith("/")
        if row["error_kind"] in ("", "no_model"):
            for uri in filter(None, (row["uri"], row["mask"])):
                check_no_secret(uri)
                assert any(uri == prefix or uri.startswith(f"{prefix.rstrip('/')}/") for prefix in allow)
                assert ".." not in uri.split("/")
            assert row["category"] == (record["category"] or rule.category(row["uri"]))
            for name, uri in ((record["uri"], row["uri"]), (record["mask"], row["mask"])):
                if name and "://" not in name and not name.startswith("/"):
                    assert uri == f"{FOLDER}/{PurePosixPath(name)}"
        elif is_relative and record["uri"] and not record["mask"] and FOLDER in allow:
            assert ".." in record["uri"].split("/")


def test_a_users_column_of_any_type_is_kept_beside_odd_rows(tmp_path: Path) -> None:
    notes = pa.array(["x", "y", "z"], pa.string_view())
    pq.write_table(pa.table({"uri": ["a.png", "./dir//b.png", "../up.png"], "note": notes}), tmp_path / "list.parquet")
    found = rows(f"{tmp_path}/list.parquet")
    assert [(row["note"], row["error_kind"]) for row in found] == [("x", ""), ("y", ""), ("z", "not_allowed")]
    assert found[1]["uri"] == f"{tmp_path}/dir/b.png"


def test_a_table_in_a_folder_that_is_not_utf8_names_images(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    write_table(f"{folder}/list.csv", [{"uri": "a.png", "line": 1}])
    (row,) = rows(f"{folder}/list.csv")
    assert (row["uri"], row["error_kind"], row["line"]) == (f"{tmp_path}/caf%E9/a.png", "bad_name", "1")
