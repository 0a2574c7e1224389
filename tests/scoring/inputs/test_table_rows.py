from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stpm.scoring.inputs import table_rows
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.table_rows import rows_at_once, rows_one_by_one
from stpm.scoring.inputs.table_uris import allowed_prefixes, check_allowed, resolve, resolve_plain
from tests.scoring.inputs.helpers import NUT, rows, write_table

# Parts of names of which each means something to `resolve`, `check_allowed` or `check_no_secret`.
PARTS = ["/", "//", ".", "..", "...", ":", "::", "://", "@", "?", "#", "%41", "~", "\n", "\\", "\0", " ", "é", "a"]
PARTS += [
    "s3://plant",
    "s3://plant/",
    "s3://",
    "s3://..",
    "S3://plant/a",
    "abfs://box@me.example/",
    "https://host/",
    "B.png",
]
PARTS += ["/plant", "me:secret@", "plant", "x.tar#", "memory://", "zip::", "http:/", "file:///plant/"]
NAMES = st.lists(st.sampled_from(PARTS), max_size=6).map("".join) | st.text(max_size=5)
FOLDERS = [
    "",
    "/plant",
    "/plant/a::b",
    "/plant/.x/..",
    "memory:/",
    "s3://plant",
    "s3://plant/",
    "s3://me:secret@plant/a",
    "s3:/",
]
FOLDERS += ["https://host/a", "memory://a", "abfs://box@me.example/a"]
PREFIXES = ["/plant", "/", "s3://plant", "s3://plant/a/", "s3://", "https://host", "abfs://box@me.example", "/plant/a"]
PREFIXES += [os.fsdecode(b"/caf\xe9")]


@given(
    st.lists(NAMES, max_size=8), st.sampled_from(FOLDERS), st.lists(st.sampled_from(PREFIXES), min_size=1, max_size=3)
)
@settings(max_examples=500, deadline=None)
def test_a_plain_name_resolves_as_it_does_alone(names: list[str], folder: str, prefixes: list[str]) -> None:
    uris, holds = resolve_plain(pa.chunked_array([names], pa.string()), folder, prefixes)
    for name, uri, is_plain in zip(names, uris.to_pylist(), holds, strict=True):
        if is_plain:
            assert uri == resolve(name, folder)
            assert check_allowed([uri], prefixes) is None


@pytest.mark.parametrize(
    "name", ["", "a.png", ".a/..b/c d.png", "12:00/é#?@~\\.png", "/plant/a.png", "s3://plant/a@b.png"]
)
def test_usual_names_are_plain(name: str) -> None:
    _, holds = resolve_plain(pa.chunked_array([[name]]), "/plant", ["/plant", "s3://plant"])
    assert holds.all()


TEXTS = st.text(st.sampled_from("aB/.é"), max_size=3)
ROWS = st.lists(st.fixed_dictionaries({"uri": NAMES, "mask": st.just("") | NAMES, "category": TEXTS, "label": TEXTS}))
RULES = [NUT, CategoryRule(), CategoryRule(pattern="{category}/{name}"), CategoryRule(pattern="t/{category}.png")]


@given(
    ROWS,
    st.sampled_from(RULES),
    st.sampled_from(["/plant/m.csv", "s3://plant/m.parquet", "/p.tar#/x.parquet"]),
    st.booleans(),
)
@example([{"uri": "~\0", "mask": "", "category": "", "label": ""}], NUT, "/plant/m.csv", False)
@example([{"uri": "~\0://", "mask": "", "category": "", "label": ""}], NUT, "/plant/m.csv", False)
@settings(max_examples=300, deadline=None)
def test_rows_are_the_same_at_once_and_one_by_one(
    records: list[dict[str, str]], rule: CategoryRule, uri: str, holds_images: bool
) -> None:
    names = ["category", "label", "mask"] if holds_images else ["category", "label", "mask", "uri"]
    chunk = pa.table({name: pa.array([record[name] for record in records], pa.string()) for name in names})
    numbers, allowed = np.arange(7, 7 + len(records)), allowed_prefixes(uri, [])
    expected = rows_one_by_one(chunk, numbers, uri, rule, allowed)
    assert rows_at_once(chunk, numbers, uri, rule, allowed).equals(expected)


def test_only_odd_rows_are_made_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def count(chunk: pa.Table, *arguments: object) -> pa.Table:
        counts.append(chunk.num_rows)
        return rows_one_by_one(chunk, *arguments)

    monkeypatch.setattr(table_rows, "rows_one_by_one", count)
    uris = [f"dir/{number}.png" for number in range(1000)]
    uris[10], uris[20], uris[30] = "../up.png", "", "dir//x.png"
    write_table(f"{tmp_path}/list.csv", [{"uri": uri, "line": number} for number, uri in enumerate(uris)])
    found = rows(f"{tmp_path}/list.csv")
    assert counts == [3]
    assert [row["line"] for row in found] == [str(number) for number in range(1000)]
    errors = {number: row["error_kind"] for number, row in enumerate(found) if row["error_kind"]}
    assert errors == {10: "not_allowed", 20: "missing"}
    assert found[30]["uri"] == f"{tmp_path}/dir/x.png"


def test_a_users_column_of_any_type_is_kept_beside_odd_rows(tmp_path: Path) -> None:
    notes = pa.array(["x", "y"], pa.string_view())
    pq.write_table(pa.table({"uri": ["a.png", "./b.png"], "note": notes}), tmp_path / "list.parquet")
    assert [row["note"] for row in rows(f"{tmp_path}/list.parquet")] == ["x", "y"]


def test_a_table_in_a_folder_that_is_not_utf8_names_images(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    write_table(f"{folder}/list.csv", [{"uri": "a.png", "line": 1}])
    (row,) = rows(f"{folder}/list.csv")
    assert (row["uri"], row["error_kind"], row["line"]) == (f"{tmp_path}/caf%E9/a.png", "bad_name", "1")
