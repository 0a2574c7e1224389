"""The summary of rows: counts, and examples of errors. A task summarizes what it writes; summaries add up."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from stpm import records
from stpm.scoring.run_statistics import CategoryCounts

T = TypeVar("T")

# Maximum number of images with an error that a summary names.
_ERROR_EXAMPLES = 10
_ERROR_COLUMNS = ["uri", "error_kind", "error_message"]


@dataclass(frozen=True)
class RowSummary:
    """Counts of rows, and some of those with an error. Summaries of different rows add up, in any order.

    Args:
        categories: counts of rows by category.
        errors: rows without a score, by error kind.
        error_examples: the first of these rows by their URIs, a line each.
        bytes_read: size of all image files.
        tasks: names of the tasks that wrote the rows, sorted.
    """

    categories: dict[str, CategoryCounts] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    error_examples: list[str] = field(default_factory=list)
    bytes_read: int = 0
    tasks: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(counts.rows for counts in self.categories.values())

    @property
    def anomalous(self) -> int:
        return sum(counts.anomalous for counts in self.categories.values())

    @classmethod
    def of_rows(cls, rows: pa.Table, task: str) -> RowSummary:
        """Summarize rows of schema OUTPUT that one task wrote."""
        sums = [([], "count_all"), ("is_anomalous", "sum"), ("bytes", "sum")]
        categories: defaultdict[str, CategoryCounts] = defaultdict(CategoryCounts)
        errors: Counter[str] = Counter()
        bytes_read = 0
        for group in rows.group_by(["category", "error_kind"]).aggregate(sums).to_pylist():
            count = group["count_all"]
            failed = count if group["error_kind"] else 0
            categories[group["category"]] += CategoryCounts(count, group["is_anomalous_sum"] or 0, failed)
            errors[group["error_kind"]] += failed
            bytes_read += group["bytes_sum"] or 0
        failures = rows.select(_ERROR_COLUMNS).filter(pc.field("error_kind") != "").to_pylist()
        return cls(
            categories=_by_name(categories),
            errors=_by_name(dict(+errors)),
            error_examples=_first_examples(": ".join(row[name] for name in _ERROR_COLUMNS) for row in failures),
            bytes_read=bytes_read,
            tasks=[task],
        )

    @classmethod
    def total(cls, summaries: Iterable[RowSummary]) -> RowSummary:
        """Add up summaries of different rows."""
        categories: defaultdict[str, CategoryCounts] = defaultdict(CategoryCounts)
        errors: Counter[str] = Counter()
        examples: list[str] = []
        bytes_read = 0
        tasks: set[str] = set()
        for each in summaries:
            for name, counts in each.categories.items():
                categories[name] += counts
            errors.update(each.errors)
            examples = _first_examples([*examples, *each.error_examples])
            bytes_read += each.bytes_read
            tasks.update(each.tasks)
        return cls(
            categories=_by_name(categories),
            errors=_by_name(dict(errors)),
            error_examples=examples,
            bytes_read=bytes_read,
            tasks=sorted(tasks),
        )

    def to_json(self) -> bytes:
        return records.to_json(self, indent=None)

    @classmethod
    def from_json(cls, text: bytes) -> RowSummary:
        """Read what `to_json` wrote. Raise ValueError if it is something else."""
        return records.from_json(cls, text)


def _by_name(values: dict[str, T]) -> dict[str, T]:
    return dict(sorted(values.items()))


def _first_examples(examples: Iterable[str]) -> list[str]:
    return heapq.nsmallest(_ERROR_EXAMPLES, examples)
