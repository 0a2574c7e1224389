import gzip
import io
import os
import tarfile
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stpm import storage
from stpm.data import image_files
from stpm.errors import ImageError
from stpm.scoring.inputs.category_rule import CategoryRule
from tests.scoring.inputs.helpers import read_row, rows


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


def test_a_damaged_or_compressed_tar_is_a_row_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(gzip.compress(b"x" * 4096))
    write_tar(tmp_path / "b.tar", [("1.png", b"x"), ("2.png", b"y" * 2000)])
    whole = (tmp_path / "b.tar").read_bytes()
    # The header of 2.png is there, the end of its bytes is not.
    (tmp_path / "b.tar").write_bytes(whole[:2048])
    (tmp_path / "c.png").write_bytes(b"z")
    # The second header is damaged, and in e.tar it is missing.
    (tmp_path / "d.tar").write_bytes(whole[:1024] + b"\xff" * 512 + whole[1536:])
    (tmp_path / "e.tar").write_bytes(whole[:1024])
    found = {row["uri"].removeprefix(f"{tmp_path}/"): row["error_kind"] for row in rows(str(tmp_path))}
    damaged = {f"{name}.tar": "damaged" for name in "abde"}
    good = ["b.tar#1.png", "b.tar#2.png", "c.png", "d.tar#1.png", "e.tar#1.png"]
    assert found == damaged | dict.fromkeys(good, "")
    assert rows(f"{tmp_path}/a.tar")[0]["error_message"].startswith("this archive cannot be read to its end: ")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_a_parquet_file_may_hold_images(tmp_path: Path, nested: bool, alone: bool) -> None:
    files = [bytes([i]) * (i + 1) for i in range(25)]
    column = [{"bytes": data, "path": "x.png"} for data in files] if nested else files
    name = "image" if nested else "bytes"
    others = {} if alone else {"category": ["nut"] * 24 + [""], "line": list(range(25))}
    table = pa.table({name: column, **others})
    pq.write_table(table, tmp_path / "part-0.parquet", row_group_size=10)
    pq.write_table(table.slice(0, 3), tmp_path / "part-1.parquet")
    found = rows(f"{tmp_path}/part-*.parquet", rule=CategoryRule("bolt"))
    places = [(0, i) for i in range(25)] + [(1, i) for i in range(3)]
    assert [row["uri"] for row in found] == [f"{tmp_path}/part-{part}.parquet#{row}" for part, row in places]
    assert name not in found[0]
    if not alone:
        assert (found[24]["category"], found[24]["line"], found[0]["error_kind"]) == ("bolt", 24, "")
    for row, data in zip(found, files, strict=False):
        assert read_row(row) == data
        assert image_files.read_uri(row["uri"]) == data
    with pytest.raises(ImageError, match="has 25 rows, row 25 is wanted"):
        image_files.read_uri(f"{tmp_path}/part-0.parquet#25")


def test_a_damaged_row_group_is_an_error_of_its_images_alone(tmp_path: Path) -> None:
    files = [os.urandom(1000) for _ in range(6)]
    pq.write_table(pa.table({"image": files}), tmp_path / "p.parquet", row_group_size=3, use_dictionary=False)
    data = bytearray((tmp_path / "p.parquet").read_bytes())
    start = pq.read_metadata(tmp_path / "p.parquet").row_group(1).column(0).data_page_offset
    data[start : start + 40] = bytes(40)
    (tmp_path / "p.parquet").write_bytes(data)
    found = rows(f"{tmp_path}/p.parquet")
    assert [read_row(row) for row in found[:3]] == files[:3]
    for row in found[3:]:
        with pytest.raises(ImageError, match="the file that holds it: ") as caught:
            read_row(row)
        assert caught.value.kind == "damaged"


def test_a_parquet_file_that_cannot_be_fetched_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mount").mkdir()
    for folder, kind in (("mount", "missing"), ("unmounted", "unreadable")):
        with pytest.raises(ImageError) as caught:
            image_files.read_uri(f"{tmp_path}/{folder}/p.parquet#0")
        assert caught.value.kind == kind
    monkeypatch.setattr(pq, "read_metadata", Mock(side_effect=ConnectionResetError("reset by peer")))
    with pytest.raises(ImageError, match="reset by peer") as caught:
        image_files.read_uri(f"{tmp_path}/mount/p.parquet#0")
    assert caught.value.kind == "unreadable"


def test_an_archive_may_have_a_name_that_is_longer_in_lower_case(tmp_path: Path) -> None:
    folder = tmp_path / "İstanbul.parquet#1"
    folder.mkdir()
    write_tar(folder / "İ.Tar", [("a.parquet#1.png", b"x")])
    pq.write_table(pa.table({"image": [b"y"]}), folder / "İ.parquet")
    found = rows(str(folder / "İ.Tar")) + rows(str(folder / "İ.parquet"))
    assert [read_row(row) for row in found] == [b"x", b"y"]
    assert [image_files.read_uri(row["uri"]) for row in found] == [b"x", b"y"]


def test_the_last_tar_member_of_a_name_counts(tmp_path: Path, root: str) -> None:
    files = [("a/1.png", b"old"), ("a/2.png", b"two"), ("./a/1.png", b"new!"), ("a/3.png", b"gone")]
    files.append(("a/1.json", b"{}"))
    write_tar(tmp_path / "s.tar", files, {"a/#4.png": "a/2.png", "a/5.png": "a/none.png"})
    with tarfile.open(tmp_path / "s.tar", "a") as archive:
        folder = tarfile.TarInfo("a/3.png")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    storage.publish(f"{root}/shards/0.tar", (tmp_path / "s.tar").read_bytes())
    found = rows(f"{root}/shards", rule=CategoryRule(pattern="{category}/{name}"))
    assert {row["category"] for row in found} == {"a"}
    read = {row["uri"].rpartition("/")[2]: read_row(row) for row in found}
    assert read == {"2.png": b"two", "1.png": b"new!", "#4.png": b"two"}


def test_a_listed_tar_member_takes_few_bytes(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", [(f"{number:08}.png", b"") for number in range(4000)])
    tracemalloc.start()
    images, _ = image_files.tar_images(f"{tmp_path}/s.tar")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Name, URI and position. tarfile's own description of a member takes as much again, and more.
    assert peak / len(images) < 450


def test_a_tar_member_is_found_by_its_uri_also_in_a_tar_that_was_written_again(tmp_path: Path) -> None:
    uri = str(tmp_path / "s.tar")
    for number, names in enumerate((("a/1.png", "a/2.png"), ("a/2.png", "a/1.png"))):
        write_tar(Path(uri), [(name, name.encode()) for name in names])
        os.utime(uri, (number, number))
        assert image_files.read_uri(f"{uri}#a/1.png") == b"a/1.png"
    with pytest.raises(ImageError, match="no such image in the archive"):
        image_files.read_uri(f"{uri}#a/3.png")
