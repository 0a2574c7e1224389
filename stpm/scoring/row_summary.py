"""The summary of rows: counts, and examples of errors. A task summarizes what it writes; summaries add up."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

import pyarrow as pa
import pyarrow.compute as pc

from stpm import records
from stpm.scoring.run_statistics import CategoryCounts, RowCounts

# Maximum number of images with an error that a summary names.
_ERROR_EXAMPLES = 10
_ERROR_COLUMNS = ["uri", "error_kind", "error_message"]


@dataclass(frozen=True)
class RowSummary(RowCounts):
    """Counts of rows, and the names of the tasks that wrote them, sorted. Summaries of different rows add up."""

    tasks: list[str] = field(default_factory=list)

    @classmethod
    def of_rows(cls, rows: pa.Table, task: str) -> RowSummary:
        """Summarize rows of schema OUTPUT that one task wrote."""
        sums = [([], "count_all"), ("is_anomalous", "sum"), ("bytes", "sum")]
        failures = rows.select(_ERROR_COLUMNS).filter(pc.field("error_kind") != "").to_pylist()
        summaries = [cls(error_examples=[": ".join(row.values()) for row in failures], tasks=[task])]
        for group in rows.group_by(["category", "error_kind"]).aggregate(sums).to_pylist():
            count, anomalous = group["count_all"], group["is_anomalous_sum"] or 0
            errors = {group["error_kind"]: count} if group["error_kind"] else {}
            categories = {group["category"]: CategoryCounts(count, anomalous, sum(errors.values()))}
            summaries.append(cls(count, anomalous, errors, [], categories, group["bytes_sum"] or 0))
        return cls.total(summaries)

    @classmethod
    def total(cls, summaries: Iterable[RowSummary]) -> RowSummary:
        """Add up summaries of different rows, in any order."""
        parts = list(summaries)
        categories: defaultdict[str, CategoryCounts] = defaultdict(CategoryCounts)
        errors: Counter[str] = Counter()
        for part in parts:
            errors.update(part.errors)
            for name, counts in part.categories.items():
                categories[name] += counts
        return cls(
            rows=sum(part.rows for part in parts),
            anomalous=sum(part.anomalous for part in parts),
            errors=dict(sorted(errors.items())),
            error_examples=heapq.nsmallest(_ERROR_EXAMPLES, chain.from_iterable(part.error_examples for part in parts)),
            categories=dict(sorted(categories.items())),
            bytes_read=sum(part.bytes_read for part in parts),
            tasks=sorted({task for part in parts for task in part.tasks}),
        )

    def to_json(self) -> bytes:
        return records.to_json(self, indent=None)

    @classmethod
    def from_json(cls, text: bytes) -> RowSummary:
        """Read what `to_json` wrote. Raise ValueError if it is something else."""
        return records.from_json(cls, text)
