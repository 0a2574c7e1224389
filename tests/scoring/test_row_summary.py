from collections import Counter
from itertools import pairwise
from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from stpm.scoring.row_summary import COLUMNS, RowSummary
from stpm.scoring.run_statistics import CategoryCounts
from stpm.scoring.schema import OUTPUT

_SCORE = st.one_of(st.none(), st.floats(-4, 4, width=16))
_ROW = st.tuples(st.sampled_from(["nut", "bolt"]), _SCORE, st.floats(-2, 2, width=16), st.booleans())


def make_rows(drawn: list[tuple[str, float | None, float, bool]]) -> list[dict[str, Any]]:
    """Make rows from category, score (None: an error), threshold, and whether the score is a sum."""
    return [
        {
            "image_id": number,
            "uri": f"/{number:03}.png",
            "category": category,
            "score": score,
            "coarse_score": score if is_scaled else None,
            "fine_score": None,
            "threshold": None if score is None else threshold,
            "is_anomalous": None if score is None else score > threshold,
            "bytes": None if score is None else 10 + number,
            "error_kind": ("empty", "damaged")[number % 2] if score is None else "",
            "error_message": "no bytes" if score is None else "",
        }
        for number, (category, score, threshold, is_scaled) in enumerate(drawn)
    ]


def margin(row: dict[str, Any]) -> float:
    above: float = row["score"] - row["threshold"]
    return above if row["coarse_score"] is not None else above / max(abs(row["threshold"]), 1e-30)


@given(st.lists(_ROW, max_size=40), st.lists(st.integers(0, 40), max_size=4), st.lists(st.integers(0, 12), min_size=6))
def test_summaries_of_parts_add_up_to_what_a_scan_counts(
    drawn: list[tuple[str, float | None, float, bool]], cuts: list[int], ranked: list[int]
) -> None:
    rows = make_rows(drawn)
    schema = pa.schema([OUTPUT.field(name) for name in COLUMNS])
    parts = []
    for number, (start, stop) in enumerate(pairwise([0, *sorted(cuts), len(rows)])):
        table = pa.Table.from_pylist(rows[start:stop], schema)
        parts.append(RowSummary.of_rows(table, f"task {number}", ranked[number]))
    stored = [RowSummary.from_json(part.to_json()) for part in parts]
    assert stored == parts
    # A total names as many images as its shortest part.
    max_ranked = min(ranked[: len(parts) + 1])
    total = RowSummary.total(stored, ranked[len(parts)])
    assert total == RowSummary.total(reversed(stored), ranked[len(parts)])
    assert total.max_ranked == max_ranked

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
    expected = sorted(((margin(row), row["image_id"]) for row in scored), reverse=True)[:max_ranked]
    assert [(image.margin, image.image_id) for image in total.ranked] == expected
    for image in total.ranked:
        (part,) = (part for part in parts if image in part.ranked)
        assert image.task == f"task {parts.index(part)}"
