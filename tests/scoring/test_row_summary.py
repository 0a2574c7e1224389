from collections import Counter
from itertools import pairwise
from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from stpm.scoring.row_summary import RowSummary
from stpm.scoring.run_statistics import CategoryCounts
from stpm.scoring.schema import OUTPUT

_SCORE = st.one_of(st.none(), st.floats(-4, 4, width=16))
_ROW = st.tuples(st.sampled_from(["nut", "bolt"]), _SCORE)
_COLUMNS = ["uri", "category", "is_anomalous", "bytes", "error_kind", "error_message"]


def make_rows(drawn: list[tuple[str, float | None]]) -> list[dict[str, Any]]:
    """Make rows from category and score (None: an error); the threshold is 1."""
    return [
        {
            "uri": f"/{number:03}.png",
            "category": category,
            "is_anomalous": None if score is None else score > 1,
            "bytes": None if score is None else 10 + number,
            "error_kind": ("empty", "damaged")[number % 2] if score is None else "",
            "error_message": "no bytes" if score is None else "",
        }
        for number, (category, score) in enumerate(drawn)
    ]


@given(st.lists(_ROW, max_size=40), st.lists(st.integers(0, 40), max_size=4))
def test_summaries_of_parts_add_up_to_what_a_scan_counts(
    drawn: list[tuple[str, float | None]], cuts: list[int]
) -> None:
    rows = make_rows(drawn)
    schema = pa.schema([OUTPUT.field(name) for name in _COLUMNS])
    parts = []
    for number, (start, stop) in enumerate(pairwise([0, *sorted(cuts), len(rows)])):
        table = pa.Table.from_pylist(rows[start:stop], schema)
        parts.append(RowSummary.of_rows(table, f"task {number}"))
    stored = [RowSummary.from_json(part.to_json()) for part in parts]
    assert stored == parts
    total = RowSummary.total(stored)
    assert total == RowSummary.total(reversed(stored))
    assert total.tasks == [f"task {number}" for number in range(len(parts))]

    failed = [row for row in rows if row["error_kind"]]
    scored = [row for row in rows if not row["error_kind"]]
    assert (total.rows, total.anomalous) == (len(rows), sum(row["is_anomalous"] for row in scored))
    assert total.errors == dict(sorted(Counter(row["error_kind"] for row in failed).items()))
    assert total.error_examples == [f"{row['uri']}: {row['error_kind']}: no bytes" for row in failed[:10]]
    assert total.bytes_read == sum(row["bytes"] for row in scored)
    for category, counts in total.categories.items():
        own = [row for row in rows if row["category"] == category]
        assert counts == CategoryCounts(
            rows=len(own),
            anomalous=sum(bool(row["is_anomalous"]) for row in own),
            errors=sum(bool(row["error_kind"]) for row in own),
        )
