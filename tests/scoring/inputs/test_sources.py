"""What sources of images become, as rows of a manifest."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stpm.scoring.inputs.categories import Categories

from stpm import storage
from stpm.errors import ConfigError, DataError, ImageError
from stpm.scoring.inputs import archives
from stpm.scoring.inputs.archives import ImageRef
from stpm.scoring.inputs.sources import Allowed, rows_of
from stpm.scoring.schema import MANIFEST

NUT = Categories("nut")


def rows(*sources: str, categories: Categories = NUT, **options: object) -> list[dict[str, object]]:
    chunks = list(rows_of(sources, categories, **options))  # type: ignore[arg-type]
    found: list[dict[str, object]] = pa.concat_tables(chunks, promote_options="default").to_pylist()
    return found


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    uri = str(tmp_path) if request.param == "local" else memory
    for name in ("b.png", "a.JPG", "deep/er/c.tiff", "deep/d.webp", "notes.txt", "deep/x.csv"):
        storage.publish(f"{uri}/images/{name}", b"x")
    storage.publish(f"{uri}/images-of-others/e.png", b"x")
    return uri


def test_a_folder_gives_the_images_at_any_depth_and_nothing_else(root: str) -> None:
    (chunk,) = rows_of([f"{root}/images"], NUT)
    assert chunk.schema.equals(MANIFEST)
    names = {str(uri).split("/images/")[1] for uri in chunk["uri"].to_pylist()}
    assert names == {"b.png", "a.JPG", "deep/er/c.tiff", "deep/d.webp"}
    assert set(chunk["category"].to_pylist()) == {"nut"}


def test_one_image_is_a_source_too(root: str) -> None:
    assert [row["uri"] for row in rows(f"{root}/images/b.png")] == [f"{root}/images/b.png"]


def test_a_glob_gives_what_it_names(root: str) -> None:
    assert [row["uri"] for row in rows(f"{root}/images/*.png")] == [f"{root}/images/b.png"]
    assert len(rows(f"{root}/images/**")) == 4


def test_a_name_that_exists_is_no_glob_and_one_that_is_quoted_is_none(root: str) -> None:
    for name in ("line3/a.png", "line[3]/b.png", "x*y.png", "xzy.png"):
        storage.publish(f"{root}/{name}", b"x")
    assert [row["uri"] for row in rows(f"{root}/line[3]")] == [f"{root}/line[3]/b.png"]
    assert [row["uri"] for row in rows(f"{root}/x*y.png")] == [f"{root}/x*y.png"]
    assert [row["uri"] for row in rows(f"{root}/line[[]3]")] == [f"{root}/line[3]/b.png"]
    assert [row["uri"] for row in rows(f"{root}/line[[]3]/*.png")] == [f"{root}/line[3]/b.png"]
    storage.remove(f"{root}/line[3]")
    assert [row["uri"] for row in rows(f"{root}/line[3]/*.png")] == [f"{root}/line3/a.png"]
    with pytest.raises(DataError, match="no images here"):
        rows(f"{root}/line[[]3]")
    with pytest.raises(ConfigError, match=r"a\*\*b"):
        rows(f"{root}/a**b")
    with pytest.raises(DataError, match="no images here"):
        rows(f"{root}/*.csv")


def test_a_name_that_is_not_utf8_is_a_row_that_says_so(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "nut").mkdir()
    with tarfile.open(tmp_path / "nut" / "s.tar", "w") as archive:
        archive.add(tmp_path / name, f"nut/{name}")
    pattern = Categories(pattern="{category}/{name}")
    (listed,) = rows("-", lines=[str(tmp_path / name)])
    member, alone = sorted(rows(str(tmp_path), categories=pattern), key=lambda row: str(row["error_kind"]))
    for row in (alone, listed):
        assert (row["uri"], row["error_kind"]) == (f"{tmp_path}/caf%E9.png", "bad_name")
        assert "not UTF-8" in str(row["error_message"])
    # Where a member lies is known: it is read all the same.
    assert (member["uri"], member["category"]) == (f"{tmp_path}/nut/s.tar#nut/caf%E9.png", "nut")
    assert member["error_kind"] == ""
    assert archives.read_uri(str(member["uri"])) == b"x"


def test_several_sources_are_one_list(root: str) -> None:
    lines = [f"{root}/images/b.png\n", "\n", f"  {root}/elsewhere/no-suffix\n"]
    found = [row["uri"] for row in rows(f"{root}/images-of-others", "-", lines=lines)]
    assert found == [f"{root}/images-of-others/e.png", f"{root}/images/b.png", f"{root}/elsewhere/no-suffix"]


@pytest.mark.parametrize("source", ["nothing", "images/*.bmp", "images/notes.txt"])
def test_a_source_without_images_is_named(root: str, source: str) -> None:
    with pytest.raises(DataError, match="no images here"):
        rows(f"{root}/{source}")


def write_manifest(uri: str, records: Sequence[Mapping[str, object]]) -> None:
    kind = uri.rsplit(".", 1)[1]
    if kind == "parquet":
        data = storage.parquet(pa.Table.from_pylist(records))
    elif kind == "csv":
        names = list(records[0])
        data = "\n".join([",".join(names), *(",".join(str(r[n]) for n in names) for r in records)]).encode()
    else:
        data = "\n".join(json.dumps(record) for record in records).encode()
    storage.publish(uri, data)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_manifests_own_columns_are_kept(root: str, kind: str) -> None:
    records: list[dict[str, object]] = [
        {"uri": "images/b.png", "category": "bolt", "line": 3, "label": "good"},
        {"uri": f"{root}/images/a.JPG", "category": "", "line": 4, "label": "scratch"},
    ]
    write_manifest(f"{root}/list.{kind}", records)
    first, second = rows(f"{root}/list.{kind}")
    line = 3 if kind == "parquet" else "3"
    assert (first["uri"], first["category"], first["line"]) == (f"{root}/images/b.png", "bolt", line)
    # Where the manifest names no category the option does.
    assert (second["uri"], second["category"], second["label"]) == (f"{root}/images/a.JPG", "nut", "scratch")
    assert all(row["error_kind"] == "" for row in (first, second))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_text_stays_text(tmp_path: Path, kind: str) -> None:
    own = {"serial": "00123", "day": "2024-01-01", "at": "2024-01-01T10:00:00Z", "yes": "true", "size": "1e3"}
    # A column that is empty for longer than a reader looks ahead.
    records = [{"uri": f"{i}.png", "category": "007", **own, "note": ""} for i in range(30_000)]
    records[-1]["note"] = "a 7"
    write_manifest(f"{tmp_path}/list.{kind}", records)
    found = rows(f"{tmp_path}/list.{kind}", categories=Categories())
    assert len(found) == 30_000
    assert {name: found[0][name] for name in ("category", *own)} == {"category": "007", **own}
    assert (found[0]["note"], found[-1]["note"]) == ("", "a 7")


def test_values_of_json_that_are_no_text_become_the_text_that_they_are(tmp_path: Path) -> None:
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
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_column_that_clashes_is_named(tmp_path: Path, name: str, kind: str) -> None:
    write_manifest(f"{tmp_path}/a.{kind}", [{"uri": "a.png", name: 1}])
    with pytest.raises(ConfigError, match=f"column {name} is one that scoring writes itself"):
        rows(f"{tmp_path}/a.{kind}")


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    listed = ["a.png", "/etc/passwd", "../up.png", "s3://other/x.png", "file:///etc/passwd", "simplecache::a.png"]
    (tmp_path / "in").mkdir()
    with (tmp_path / "in" / "list.csv").open("w") as file:
        csv.writer(file).writerows([["uri"], *([uri] for uri in listed)])
    found = rows(str(tmp_path / "in" / "list.csv"))
    assert [row["error_kind"] for row in found] == ["", *["not_allowed"] * 5]
    assert f"only what is under {tmp_path / 'in'}" in str(found[1]["error_message"])
    allowed = rows(str(tmp_path / "in" / "list.csv"), allow=[str(tmp_path / "in"), "s3://other"])
    assert [row["error_kind"] for row in allowed] == [
        "",
        "not_allowed",
        "not_allowed",
        "",
        "not_allowed",
        "not_allowed",
    ]


def test_a_manifest_cannot_name_masks_elsewhere(tmp_path: Path) -> None:
    write_manifest(
        f"{tmp_path}/list.jsonl", [{"uri": "a.png", "mask": "m.png"}, {"uri": "b.png", "mask": "/etc/passwd"}]
    )
    good, bad = rows(f"{tmp_path}/list.jsonl")
    assert (good["mask"], good["error_kind"]) == (f"{tmp_path}/m.png", "")
    assert bad["error_kind"] == "not_allowed"


def test_by_default_a_manifest_may_name_its_own_bucket_or_folder() -> None:
    assert Allowed.by("s3://plant/lists/a.csv", []).prefixes == ("s3://plant",)
    assert Allowed.by("/data/lists/a.csv", []).prefixes == ("/data/lists",)
    allowed = Allowed(("s3://plant",))
    assert allowed.refusal("s3://plant/images/a.png") == ""
    for uri in ("s3://plants/a.png", "s3://plant/../other/a.png", "/plant", "filecache::s3://plant/a.png"):
        assert "see --allow" in allowed.refusal(uri)


def test_manifests_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    write_manifest(f"{tmp_path}/a.csv", [{"path": "a.png"}])
    with pytest.raises(DataError, match="no column `uri`, nor images in a column image or bytes; its columns are path"):
        rows(f"{tmp_path}/a.csv")
    write_manifest(f"{tmp_path}/b.csv", [{"uri": "a.png", "score": 1}])
    with pytest.raises(ConfigError, match="column score is one that scoring writes itself"):
        rows(f"{tmp_path}/b.csv")
    broken = {"twice.csv": "uri,a,a\nx.png,1,2", "short.csv": "uri,a\nx.png", "latin.csv": "uri\ncaf\xe9.png"}
    broken |= {"a.jsonl": "[1]", "b.jsonl": '{"uri": "a.png"}\n{"uri": ', "c.jsonl": "[" * 100_000}
    for name, text in broken.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(DataError, match=f"{name}: this manifest cannot be read: "):
            rows(f"{tmp_path}/{name}")
    pq.write_table(pa.table({"uri": ["a.png"], "label": [{"a": 1}]}), tmp_path / "s.parquet")
    with pytest.raises(DataError, match=r"s\.parquet: this manifest cannot be read: .*cast"):
        rows(f"{tmp_path}/s.parquet")
    foreign = pa.array([b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"uri": ["a.png"], "note": foreign}), tmp_path / "u.parquet")
    with pytest.raises(DataError, match=r"u\.parquet: this manifest cannot be read: .*UTF8"):
        rows(f"{tmp_path}/u.parquet")
    pq.write_table(pa.table({"uri": pa.array([], pa.string())}), tmp_path / "e.parquet")
    with pytest.raises(DataError, match=r"e\.parquet: this manifest has no rows"):
        rows(f"{tmp_path}/e.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"c\.parquet: this manifest cannot be read"):
        rows(f"{tmp_path}/c.parquet")
    with pytest.raises(DataError, match=r"d\.parquet: this manifest cannot be read"):
        rows(f"{tmp_path}/d.parquet")


def test_a_large_manifest_comes_in_chunks(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": [f"{i}.png" for i in range(25_000)]}), tmp_path / "m.parquet")
    chunks = list(rows_of([f"{tmp_path}/m.parquet"], NUT))
    assert max(chunk.num_rows for chunk in chunks) <= 10_000
    assert sum(chunk.num_rows for chunk in chunks) == 25_000


@pytest.mark.parametrize(
    ("pattern", "uri", "category"),
    [
        ("{category}/{date}/{name}", "s3://dump/plant/nut/2026-11-24/1.png", "nut"),
        ("{category}/{name}", "nut/1.png", "nut"),
        ("{line}-{category}.png", "s3://dump/7-nut.png", "nut"),
        ("{category}/{date}/{name}", "1.png", ""),
        ("raw.{category}/{name}", "/data/rawXnut/1.png", ""),
        ("raw.{category}/{name}", "/data/raw.nut/1.png", "nut"),
    ],
)
def test_a_pattern_over_the_end_of_the_path_gives_the_category(pattern: str, uri: str, category: str) -> None:
    assert Categories(pattern=pattern).of(uri) == category


def test_an_image_without_a_category_is_a_row_with_an_error(tmp_path: Path) -> None:
    for name in ("top.png", "nut/x.png"):
        storage.publish(f"{tmp_path}/i/{name}", b"x")
    found = {str(r["uri"])[-5:]: r for r in rows(f"{tmp_path}/i", categories=Categories(pattern="i/{category}/{n}"))}
    assert (found["x.png"]["category"], found["x.png"]["error_kind"]) == ("nut", "")
    assert found["p.png"]["error_kind"] == "no_model"
    assert "see --category" in str(found["p.png"]["error_message"])


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("{name}", "once, and no name twice"),
        ("{category}/{category}", "once, and no name twice"),
        ("{category}/{a}/{a}", "once, and no name twice"),
        ("{category}/{2}", r"\{2\} is no name"),
    ],
)
def test_a_pattern_names_the_category_once(pattern: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Categories(pattern=pattern)


def test_a_category_is_given_in_one_way() -> None:
    with pytest.raises(ConfigError, match="give one"):
        Categories("nut", "{category}/{name}")


def test_a_damaged_or_packed_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(gzip.compress(b"x" * 4096))
    with pytest.raises(DataError, match=r"a\.tar: this archive cannot be read"):
        rows(f"{tmp_path}/a.tar")


def test_archives_and_images_in_a_folder_are_one_list(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"x")
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.add(tmp_path / "x.png", "nut/1.png")
        archive.add(tmp_path / "x.png", "nut/1.cls")
    found = rows(str(tmp_path), categories=Categories(pattern="{category}/{name}"))
    assert [(row["uri"], row["archive_length"]) for row in found] == [
        (f"{tmp_path}/s.tar#nut/1.png", 1),
        (f"{tmp_path}/x.png", -1),
    ]


@pytest.mark.parametrize("nested", [False, True])
def test_images_may_be_rows_of_a_parquet_file(tmp_path: Path, nested: bool) -> None:
    files = [bytes([i]) * (i + 1) for i in range(25)]
    column = [{"bytes": data, "path": "x.png"} for data in files] if nested else files
    name = "image" if nested else "bytes"
    table = pa.table({name: column, "category": ["nut"] * 24 + [""], "line": list(range(25))})
    pq.write_table(table, tmp_path / "part-0.parquet", row_group_size=10)
    pq.write_table(table.slice(0, 3), tmp_path / "part-1.parquet")
    found = rows(f"{tmp_path}/part-*.parquet", categories=Categories("bolt"))
    assert [row["uri"] for row in found[:2]] == [f"{tmp_path}/part-0.parquet#0", f"{tmp_path}/part-0.parquet#1"]
    assert found[-1]["uri"] == f"{tmp_path}/part-1.parquet#2"
    assert (found[24]["category"], found[24]["line"], found[0]["error_kind"]) == ("bolt", 24, "")
    assert name not in found[0]
    assert len(found) == 28
    for row, data in zip(found, files, strict=False):
        assert archives.read(ImageRef(row["uri"], row["archive_start"], row["archive_length"])) == data
        assert archives.read_uri(row["uri"]) == data
    with pytest.raises(ImageError, match="has 25 rows, row 25 is wanted"):
        archives.read_uri(f"{tmp_path}/part-0.parquet#25")


@pytest.mark.parametrize("name", ["image", "bytes"])
def test_a_parquet_file_of_images_alone_has_as_many_rows_as_images(tmp_path: Path, name: str) -> None:
    files = [bytes([i]) for i in range(8)]
    pq.write_table(pa.table({name: files}), tmp_path / "p.parquet", row_group_size=3)
    found = rows(f"{tmp_path}/p.parquet")
    assert [row["uri"] for row in found] == [f"{tmp_path}/p.parquet#{i}" for i in range(8)]
    assert [archives.read(ImageRef(r["uri"], r["archive_start"], r["archive_length"])) for r in found] == files  # type: ignore[arg-type]


def write_tar(path: Path, files: Sequence[tuple[str, bytes]], links: Mapping[str, str] | None = None) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, output in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.LNKTYPE, output
            archive.addfile(member)


def test_the_last_of_several_members_with_one_name_counts(tmp_path: Path) -> None:
    files = [("a/1.png", b"old"), ("a/2.png", b"two"), ("./a/1.png", b"new!"), ("a/3.png", b"gone")]
    write_tar(tmp_path / "s.tar", files, {"a/4.png": "a/2.png", "a/5.png": "a/none.png"})
    with tarfile.open(tmp_path / "s.tar", "a") as archive:
        folder = tarfile.TarInfo("a/3.png")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    found = {str(row["uri"]).rpartition("/")[2]: row for row in rows(f"{tmp_path}/s.tar")}
    read = {n: archives.read(ImageRef(r["uri"], r["archive_start"], r["archive_length"])) for n, r in found.items()}  # type: ignore[arg-type]
    assert read == {"2.png": b"two", "1.png": b"new!", "4.png": b"two"}


def test_a_member_of_a_tar_is_found_by_its_uri(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", [("a/1.png", b"one"), ("a/2.png", b"two")])
    assert archives.read_uri(f"{tmp_path}/s.tar#a/2.png") == b"two"
    with pytest.raises(ImageError, match="no such image in the archive"):
        archives.read_uri(f"{tmp_path}/s.tar#a/3.png")


def test_a_table_that_says_nothing_of_images_is_named_with_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a.png"], "x": [1]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"no column `uri`, nor images in a column image or bytes; its columns are im"):
        rows(f"{tmp_path}/t.parquet")
