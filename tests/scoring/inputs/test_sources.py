import csv
import os
import tarfile
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from stpm import storage
from stpm.data import image_files
from stpm.errors import ConfigError, DataError, UriError
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.sources import image_rows
from stpm.scoring.inputs.table_uris import allowed_prefixes, check_allowed
from stpm.scoring.schema import MANIFEST
from tests.scoring.inputs.helpers import NUT, rows, write_table


@pytest.fixture
def root(root: str) -> str:
    for name in ("b.png", "a.JPG", "deep/er/c.tiff", "deep/d.webp", "notes.txt", "deep/x.csv"):
        storage.publish(f"{root}/images/{name}", b"x")
    storage.publish(f"{root}/images-of-others/e.png", b"x")
    return root


def test_a_folder_is_searched_for_images_at_any_depth(root: str) -> None:
    (chunk,) = image_rows([f"{root}/images"], NUT)
    assert chunk.schema.equals(MANIFEST)
    names = {str(uri).split("/images/")[1] for uri in chunk["uri"].to_pylist()}
    assert names == {"b.png", "a.JPG", "deep/er/c.tiff", "deep/d.webp"}
    assert set(chunk["category"].to_pylist()) == {"nut"}


def test_a_source_is_an_image_or_a_glob_unless_that_name_exists_or_is_escaped(root: str) -> None:
    def check(source: str, *expected: str) -> None:
        assert [row["uri"].removeprefix(f"{root}/") for row in rows(f"{root}/{source}")] == [*expected], source

    check("images/b.png", "images/b.png")
    check("images/*.png", "images/b.png")
    check("images/de*", "images/deep/d.webp", "images/deep/er/c.tiff")
    check("**/er", "images/deep/er/c.tiff")
    assert [len(rows(f"{root}/{source}")) for source in ("images/**", "**/*e*")] == [4, 5]
    for name in ("line3/a.png", "line[3]/b.png", "x*y.png", "xzy.png"):
        storage.publish(f"{root}/{name}", b"x")
    check("line[3]", "line[3]/b.png")
    check("x*y.png", "x*y.png")
    check("line[[]3]", "line[3]/b.png")
    check("line[[]3]/*.png", "line[3]/b.png")
    storage.remove(f"{root}/line[3]")
    check("line[3]/*.png", "line3/a.png")
    for source in ("line[[]3]", "*.csv", "nothing", "images/*.bmp", "images/notes.txt"):
        with pytest.raises(DataError, match="no images here"):
            rows(f"{root}/{source}")
    with pytest.raises(ConfigError, match=r"a\*\*b"):
        rows(f"{root}/a**b")


def test_a_name_that_is_not_utf8_is_a_row_with_an_error(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "nut").mkdir()
    with tarfile.open(tmp_path / "nut" / "s.tar", "w") as archive:
        archive.add(tmp_path / name, f"nut/{name}")
    pattern = CategoryRule(pattern="{category}/{name}")
    member, alone = sorted(rows(str(tmp_path), rule=pattern), key=lambda row: row["error_kind"])
    assert (alone["uri"], alone["error_kind"]) == (f"{tmp_path}/caf%E9.png", "bad_name")
    assert "not UTF-8" in alone["error_message"]
    # A tar member is read by its position, so its name does not matter.
    assert (member["uri"], member["category"]) == (f"{tmp_path}/nut/s.tar#nut/caf%E9.png", "nut")
    assert member["error_kind"] == ""
    assert image_files.read_uri(member["uri"]) == b"x"


def test_several_sources_are_joined_in_order(root: str) -> None:
    write_table(f"{root}/list.csv", [{"uri": "images/b.png"}, {"uri": "elsewhere/no-suffix"}])
    found = [row["uri"] for row in rows(f"{root}/images-of-others", f"{root}/list.csv")]
    assert found == [f"{root}/images-of-others/e.png", f"{root}/images/b.png", f"{root}/elsewhere/no-suffix"]


def test_hidden_files_and_folders_are_left_out_unless_they_are_named(tmp_path: Path) -> None:
    for name in ("a.png", "._a.png", "s/b.png", ".thumbs/c.png", "s/.thumbs/d.png"):
        storage.publish(f"{tmp_path}/{name}", b"x")
    for source, names in (
        ("", ["a.png", "s/b.png"]),
        ("/*/*.png", ["s/b.png"]),
        ("/**/*.png", ["a.png", "s/b.png"]),
        ("/.thumbs", [".thumbs/c.png"]),
        ("/.th*/*.png", [".thumbs/c.png"]),
        ("/._a.png", ["._a.png"]),
    ):
        assert [row["uri"].removeprefix(f"{tmp_path}/") for row in rows(f"{tmp_path}{source}")] == names, source


def test_a_table_cannot_name_files_outside_the_allowed_prefixes(tmp_path: Path) -> None:
    listed = ["a.png", "/etc/passwd", "../up.png", "s3://other/x.png", "file:///etc/passwd", "simplecache::a.png"]
    # The last is a name like any other.
    (tmp_path / "in").mkdir()
    with (tmp_path / "in" / "list.csv").open("w") as file:
        csv.writer(file).writerows([["uri"], *([uri] for uri in listed)])
    found = rows(str(tmp_path / "in" / "list.csv"))
    assert [row["error_kind"] for row in found] == ["", *["not_allowed"] * 4, ""]
    assert f"only what is under {tmp_path / 'in'}" in found[1]["error_message"]
    allowed = rows(str(tmp_path / "in" / "list.csv"), allow=[str(tmp_path / "in"), "s3://other"])
    assert [row["error_kind"] for row in allowed] == ["", *["not_allowed"] * 2, "", "not_allowed", ""]


def test_a_uri_with_a_secret_is_neither_read_nor_kept(tmp_path: Path) -> None:
    secrets = ["https://me:SECRET@host/a.png", "https://host/a.png?sig=SECRET"]
    records = [{"uri": secrets[0], "mask": ""}, {"uri": "a.png", "mask": secrets[1]}, {"uri": "b.png", "mask": ""}]
    write_table(f"{tmp_path}/list.jsonl", records)
    found = rows(f"{tmp_path}/list.jsonl", allow=["https://host", str(tmp_path)])
    assert [row["error_kind"] for row in found] == ["not_allowed", "not_allowed", ""]
    assert "SECRET" not in str(found)
    for secret in secrets:
        with pytest.raises(UriError, match=r"https://host/\.\.\.: this URI holds a "):
            rows(secret)


def test_a_uri_is_allowed_under_a_prefix_only_by_default_the_tables_own_bucket_or_folder() -> None:
    assert allowed_prefixes("s3://plant/lists/a.csv", []) == ("s3://plant",)
    assert allowed_prefixes("/data/lists/a.csv", []) == ("/data/lists",)
    assert check_allowed(["s3://plant/images/a.png", "", "s3://plant"], ["s3://plant"]) is None
    for uri in ("s3://plants/a.png", "s3://plant/../other/a.png", "/plant", "filecache::s3://plant/a.png"):
        refused = str(check_allowed(["s3://plant/images/a.png", uri], ["s3://plant"]))
        _, _, allowed = refused.partition("give --allow ")
        assert not check_allowed([uri], [allowed]) if ".." not in uri else refused.endswith("see --allow")


def test_a_table_whose_name_goes_up_may_name_what_is_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("jobs", "data"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "jobs")
    write_table(f"{tmp_path}/data/list.jsonl", [{"uri": "a.png"}, {"uri": "../secret.png"}])
    assert [row["error_kind"] for row in rows("../data/list.jsonl")] == ["", "not_allowed"]


def test_a_pattern_describes_paths_of_images_and_no_others(tmp_path: Path) -> None:
    rule = CategoryRule(pattern="{category}/{name}")

    def found(source: str) -> list[tuple[str, str]]:
        return [(row["error_kind"], row["category"]) for row in rows(f"{tmp_path}/{source}", rule=rule)]

    write_table(f"{tmp_path}/lists/today.jsonl", [{"uri": ""}, {"uri": "nut/a.png"}])
    assert found("lists/today.jsonl") == [("missing", ""), ("", "nut")]
    records = [{"image": b"x", "mask": "https://me:SECRET@host/m.png"}, {"image": b"x", "mask": ""}]
    write_table(f"{tmp_path}/nut/shard.parquet", records)
    assert found("nut/shard.parquet") == [("not_allowed", "nut"), ("", "nut")]
    storage.publish(f"{tmp_path}/i/nut/top.png", b"x")
    rule = CategoryRule(pattern="i/{category}/{line}/{name}")
    (row,) = rows(f"{tmp_path}/i", rule=rule)
    assert row["error_kind"] == "no_model"
    assert "see --category" in row["error_message"]


@pytest.mark.parametrize("name", ["list.csv", "list.parquet", "shard.tar"])
def test_a_clients_exception_is_an_error_of_the_source(memory: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    class HttpError(Exception):
        __module__ = "gcsfs.retry"

    def fail(self: object, *arguments: object, **more: object) -> None:
        raise HttpError("503\nslow down")

    storage.publish(f"{memory}/{name}", b"x")
    monkeypatch.setattr(MemoryFileSystem, "_open", fail)
    with pytest.raises(DataError, match=f"{name}: this .* cannot be read: HttpError: 503 slow down"):
        rows(f"{memory}/{name}")
