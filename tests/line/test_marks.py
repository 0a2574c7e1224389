import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stpm import storage
from stpm.errors import DataError
from stpm.line.marks import read_marks

ROWS = [
    ("a.png", "nut", "good"),
    ("b, \"c\"\n=d 'ü' 🦆 .png", "nut", "good"),
    ("sub/e.png", "bolt", "good"),
    ("f.png", "nut", "defect"),
    ("g.png", "nut", "Good"),
    ("h.png", "nut", ""),
]

# Whose rows hold the images themselves.
IMAGES = storage.encode_parquet(pa.table({"image": [b"x"], "label": ["good"]}))


def write(path: Path, rows: Sequence[tuple[str, str, str]]) -> str:
    names = ("uri", "category", "label")
    if path.suffix == ".parquet":
        pq.write_table(pa.table(dict(zip(names, zip(*rows, strict=True), strict=True))), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([names, *rows])
    else:
        path.write_text("".join(f"{json.dumps(dict(zip(names, row, strict=True)))}\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("kind", [".parquet", ".csv", ".jsonl", ".ndjson"])
def test_only_images_with_the_label_good_are_good(tmp_path: Path, kind: str) -> None:
    marks = read_marks(write(tmp_path / f"marks{kind}", [*ROWS, ROWS[0]]))
    assert marks.good == {
        "nut": [f"{tmp_path}/{ROWS[0][0]}", f"{tmp_path}/{ROWS[1][0]}"],
        "bolt": [f"{tmp_path}/sub/e.png"],
    }
    assert marks.other == {"defect": 1, "Good": 1, "": 1}
    assert marks.refused == {}
    assert read_marks(str(tmp_path / f"marks{kind}"), categories=["bolt"]).good == {"bolt": [f"{tmp_path}/sub/e.png"]}


def test_a_table_names_only_what_scoring_would_allow(tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    outside = [(f"{tmp_path}/x.png", "nut", "good"), ("../x.png", "nut", "good"), ("s3://b/x.png", "nut", "good")]
    uri = write(tmp_path / "marks" / "m.jsonl", [*outside, ("in.png", "nut", "good"), ("", "nut", "good")])
    marks = read_marks(uri)
    assert marks.good == {"nut": [f"{tmp_path}/marks/in.png"]}
    assert len(marks.refused) == 4
    assert (
        f"may name only what is under {tmp_path}/marks; to allow it, give --allow s3://b"
        in marks.refused["s3://b/x.png"]
    )
    assert marks.refused[f"{tmp_path}/x.png"].endswith(f"give --allow {tmp_path}")
    assert marks.refused[f"{uri}#4"] == "this row of the table has no uri"
    assert read_marks(uri, ["s3://b", str(tmp_path)]).good["nut"] == [
        f"{tmp_path}/x.png",
        "s3://b/x.png",
        f"{tmp_path}/marks/in.png",
    ]


def test_only_images_to_be_added_are_refused(tmp_path: Path) -> None:
    rows = [
        ("/elsewhere/d.png", "nut", "defect"),
        ("/elsewhere/o.png", "bolt", "good"),
        ("", "nut", "good"),
        ("", "nut", "good"),
        ("", "nut", ""),
        ("https://me:SECRET@h/a.png", "nut", "good"),
        ("https://h/b.png?X-Amz-Signature=SECRET", "nut", "good"),
        ("https://h/b.png?X-Amz-Signature=SECRET", "nut", "defect"),
    ]
    marks = read_marks(uri := write(tmp_path / "m.csv", rows), ["https://h"], ["nut"])
    assert marks.good == {}
    assert marks.other == {"defect": 2, "": 1}
    assert list(marks.refused) == [f"{uri}#{number}" for number in (2, 3, 5, 6)]
    assert "https://h/...: this URI holds a query" in marks.refused[f"{uri}#6"]
    assert "SECRET" not in str(marks)


def test_an_image_that_is_good_and_something_else_is_refused(tmp_path: Path) -> None:
    labels = ("good", "defect", "scratch", "scratch", "dent")
    rows = [(name, "nut", label) for name, label in zip("aabbb", labels, strict=True)]
    marks = read_marks(write(tmp_path / "m.jsonl", [(f"{name}.png", *rest) for name, *rest in rows]))
    assert marks.good == {}
    assert marks.other == {"scratch": 1, "dent": 1}
    assert marks.refused == {f"{tmp_path}/a.png": "it is marked as 'defect' and as 'good'"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("marks.txt", b"a.png", r"a table is a file of \.parquet, "),
        ("marks.jsonl", b"{", "this table cannot be read"),
        ("marks.csv", b"name,label\na.png,good\n", "no column `uri`"),
        ("marks.parquet", b"", "this table cannot be read"),
        ("images.parquet", IMAGES, "no column `uri`; its columns are label"),
        ("nowhere.jsonl", None, "this table cannot be read"),
    ],
)
def test_an_unreadable_table_is_one_error(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_marks(str(tmp_path / name))
