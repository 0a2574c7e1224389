"""Tables for people, as CSV and XLSX. Programs read the Parquet files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import TextIOWrapper
from typing import Any

import pyarrow as pa

from stpm import storage
from stpm.options import Export

# Rows of a sheet, and UTF-16 units of a cell: spreadsheets have no more.
_MAX_ROWS, _MAX_TEXT = 2**20, 32_767
# Integers up to here are exact in a spreadsheet, whose numbers are float64.
_EXACT = 2**53
_BOOK = {"constant_memory": True, "strings_to_formulas": False, "strings_to_urls": False}


def write_tables(folder: str, tables: Mapping[str, pa.RecordBatchReader], kind: Export) -> None:
    """Write tables to a folder: a file of CSV for each, or all to one of XLSX, named as the first.

    Some rows are in memory at a time. Lists and structs become JSON, and numbers that float64 cannot hold text. In XLSX
    a long table goes on in the next sheet. No cell is a formula: in CSV, text that would be one gets an apostrophe
    before it. CSV begins with the mark by which spreadsheets know UTF-8.
    """
    if kind == "csv":
        for name, reader in tables.items():
            with storage.writing(storage.join(folder, f"{name}.csv")) as file:
                text = TextIOWrapper(file, "utf-8-sig", newline="")
                csv.writer(text).writerows(_rows(reader, _without_formula))
                text.detach()
    if kind == "xlsx":
        from xlsxwriter import Workbook

        uri = storage.join(folder, f"{next(iter(tables))}.xlsx")
        with storage.writing(uri) as file, Workbook(file, _BOOK) as book:
            for name, reader in tables.items():
                for i, row in enumerate(_rows(reader, _cut)):
                    if i % _MAX_ROWS == 0:
                        sheet = book.add_worksheet(f"{name} ({i // _MAX_ROWS + 1})" if i else name)
                    sheet.write_row(i % _MAX_ROWS, 0, row)


def remove_tables(folder: str, names: Iterable[str]) -> None:
    """Remove the files that `write_tables` makes of tables with these names."""
    for name in names:
        for kind in ("csv", "xlsx"):
            storage.remove(storage.join(folder, f"{name}.{kind}"))


def _rows(reader: pa.RecordBatchReader, as_text: Callable[[str], str]) -> Iterator[list[Any]]:
    """Yield the names of the columns, and then the cells of each row."""

    def as_cell(value: Any) -> Any:
        # NaN fails the comparison, too.
        if value is None or isinstance(value, bool) or (isinstance(value, int | float) and abs(value) <= _EXACT):
            return value
        is_nested = isinstance(value, list | dict)
        return as_text(json.dumps(value, ensure_ascii=False, default=str) if is_nested else str(value))

    yield [as_text(name) for name in reader.schema.names]
    for batch in reader:
        # As text, a float32 has the digits that it needs, and not those of the nearest float64.
        columns = (each.cast(pa.string()).cast(pa.float64()) if each.type == pa.float32() else each for each in batch)
        yield from map(list, zip(*(map(as_cell, each.to_pylist()) for each in columns), strict=True))


def _cut(text: str) -> str:
    # A character has two units at most.
    if len(text) <= _MAX_TEXT // 2:
        return text
    return text.encode("utf-16-le")[: 2 * _MAX_TEXT].decode("utf-16-le", "ignore")


def _without_formula(text: str) -> str:
    """Put an apostrophe before text that a spreadsheet would take for a formula.

    >>> _without_formula("=cmd"), _without_formula("-cmd"), _without_formula("-3.5"), _without_formula("s3://b/=1.png")
    ("'=cmd", "'-cmd", '-3.5', 's3://b/=1.png')
    """
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text
    return text
