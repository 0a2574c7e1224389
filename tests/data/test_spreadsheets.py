"""Tables for people, read back by what people read them with."""

import csv
import datetime
import io
import json
import math
import re
import tracemalloc
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pytest

from stpm import options, storage
from stpm.data import spreadsheets
from stpm.data.spreadsheets import remove_tables, write_tables
from stpm.errors import ConfigError, RunDamagedError
from stpm.evaluation.options import ReportOptions
from stpm.scoring.options import CollectionOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import row_reader
from tests.conftest import REPOSITORY
from tests.datasets import make_output, write_rows

FORMULAS = ["=1+1", "+sum", "@a", "\tx", "\r=1", "\n="]
TEXTS = [*FORMULAS, "-3", "s3://b/=1.png", "Größe, \"'", "\x01", "0012", ""]
REGIONS = [{"box": [1, 2], "peak": 0.5}]
TABLE = pa.table(
    {
        "=evil": TEXTS,
        "score": pa.array([0.1, None, math.nan, -0.5, *range(8)], pa.float32()),
        "id": [2**53 + 1, -(2**62), *range(10)],
        "is_anomalous": [True, None, *[False] * 10],
        "regions": pa.array([REGIONS, None, *[[]] * 10]),
        "at": [datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc)] * 12,
    }
)
HEAD = TABLE.column_names
# The cells of the first rows, without the text.
CELLS = [
    [0.1, str(2**53 + 1), True, json.dumps(REGIONS), "2026-01-02 00:00:00+00:00"],
    [None, str(-(2**62)), None, None, "2026-01-02 00:00:00+00:00"],
    ["nan", 0, False, "[]", "2026-01-02 00:00:00+00:00"],
    [-0.5, 1, False, "[]", "2026-01-02 00:00:00+00:00"],
]


def encode(folder: Path, kind: options.Export, **tables: pa.Table) -> dict[str, bytes]:
    write_tables(str(folder), {name: table.to_reader(5) for name, table in tables.items()}, kind)
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    remove_tables(str(folder), tables)
    assert not [*folder.iterdir()]
    return written


def test_csv_is_read_back_without_formulas(tmp_path: Path) -> None:
    files = encode(tmp_path, "csv", rows=TABLE, none=TABLE.slice(12))
    assert sorted(files) == ["none.csv", "rows.csv"]
    head, *rows = csv.reader(io.StringIO(files["rows.csv"].decode("utf-8-sig"), newline=""))
    assert head == ["'=evil", *HEAD[1:]]
    assert [row[0] for row in rows] == [f"'{text}" if text in FORMULAS else text for text in TEXTS]
    assert [row[1:] for row in rows[:4]] == [["" if each is None else str(each) for each in row] for row in CELLS]
    assert files["none.csv"].decode("utf-8-sig").splitlines() == [",".join(head)]
    frame = pd.read_csv(io.BytesIO(files["rows.csv"]))
    assert frame["id"].tolist() == TABLE["id"].to_pylist()
    assert frame["score"].tolist()[3:] == [-0.5, *range(8)]


def test_xlsx_is_read_back_as_text_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xlsxwriter")
    openpyxl = pytest.importorskip("openpyxl")
    monkeypatch.setattr(spreadsheets, "_MAX_ROWS", 10)
    ((name, data),) = encode(tmp_path, "xlsx", report=TABLE, defects=TABLE.slice(12)).items()
    book = openpyxl.load_workbook(io.BytesIO(data))
    assert (name, book.sheetnames) == ("report.xlsx", ["report", "report (2)", "defects"])
    assert {cell.data_type for sheet in book for row in sheet.rows for cell in row if cell.value is not None} == {
        *"snb"
    }
    head, *rows, last = (list(row) for sheet in book for row in sheet.iter_rows(values_only=True))
    assert head == last == HEAD
    # Excel decodes the escapes of control characters, and openpyxl does not.
    shown = [re.sub("_x([0-9A-F]{4})_", lambda match: chr(int(match[1], 16)), row[0] or "") for row in rows]
    assert shown == TEXTS
    assert [row[1:] for row in rows[:4]] == CELLS
    assert pd.read_excel(io.BytesIO(data))["score"].tolist()[3:] == [-0.5, *range(5)]
    # A cell holds 32,767 UTF-16 units, of which some characters have two.
    texts = pa.table({"a": ["x" * 40_000], "b": ["\U0001f600" * 40_000], "c": [1]})
    (long,) = encode(tmp_path, "xlsx", rows=texts).values()
    cells = next(openpyxl.load_workbook(io.BytesIO(long))["rows"].iter_rows(min_row=2, values_only=True))
    assert cells == ("x" * 32_767, "\U0001f600" * 16_383, 1)


def test_rows_are_exported_without_pictures_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    output = RunOutput.single(str(tmp_path))
    rows = make_output(2, uri=["a", "b"], heatmap_png=[b"png", None]).append_column("line", pa.array([7, 8]))
    for number in (0, 1):
        write_rows(output, rows, number)
    write_tables(str(tmp_path), {"rows": row_reader(output)}, "csv")
    frame = pd.read_csv(tmp_path / "rows.csv")
    pictures = {"heatmap_png", "overlay_jpeg", "region_mask_png", "anomaly_map"}
    assert frame.columns.tolist() == [each for each in rows.column_names if each not in pictures]
    assert frame[["uri", "line"]].to_numpy().tolist() == [["a", 7], ["b", 8]] * 2
    # A run that starts over removes it.
    assert f"{tmp_path}/rows.csv" in output.written_uris()
    reader, whole = row_reader(output), storage.read(output.files()[1])
    storage.publish(output.files()[1], b"\0" * 2000 + whole[2000:])
    (tmp_path / "rows.csv").write_bytes(b"before")
    with pytest.raises(RunDamagedError, match=r"scores_1\.parquet is damaged"):
        write_tables(str(tmp_path), {"rows": reader}, "csv")
    assert (tmp_path / "rows.csv").read_bytes() == b"before"


@pytest.mark.parametrize("kind", ["csv", "xlsx"])
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path, kind: options.Export) -> None:
    batch, peaks = TABLE.combine_chunks().to_batches()[0], []
    for count in (50, 400):
        reader = pa.RecordBatchReader.from_batches(TABLE.schema, iter([batch] * count))
        tracemalloc.start()
        write_tables(str(tmp_path), {"rows": reader}, kind)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]


def test_the_lines_in_the_docs_read_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"category": ["a", "a", "b"], "is_anomalous": [True, True, False], "score": [1.0, 2.0, 3.0]}
    write_rows(RunOutput.single(f"{tmp_path}/scored/gravel"), make_output(3, **columns))
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall(r"```python\n(.*?)\n```", (REPOSITORY / "docs" / "scoring.md").read_text(), re.DOTALL)
    counts, largest = (eval(line, {"duckdb": duckdb, "pd": pd}) for line in lines.splitlines())  # noqa: S307
    assert sorted(counts.fetchall()) == [("a", 2, 2), ("b", 1, 0)]
    assert largest["score"].tolist() == [2.0, 1.0]


def test_a_missing_library_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    for kind, values in ((ReportOptions, {}), (CollectionOptions, {"models": "m", "images": ("i",), "out": "o"})):
        assert kind(**values, export="csv").export == "csv"
        with pytest.raises(ConfigError, match=r"^--export xlsx needs XlsxWriter: pip install 'stpm\[xlsx\]', or give"):
            kind(**values, export="xlsx")
