"""The summary of rows: counts, examples of errors, and the most anomalous images.

Each task summarizes the rows that it writes. Summaries add up, so that a run of any size ends without reading its rows.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stpm import records
from stpm.scoring.run_statistics import CategoryCounts

T = TypeVar("T")

# Maximum number of images with an error that a summary names.
_ERROR_EXAMPLES = 10
_ERROR_COLUMNS = ["uri", "error_kind", "error_message"]
VIEW_SCORES = ["fine_score", "coarse_score"]
_VALUES = ["score", *VIEW_SCORES, "threshold", "is_anomalous"]
# Columns that a summary is made from.
COLUMNS = [*_ERROR_COLUMNS, *_VALUES, "image_id", "category", "bytes"]
# Thresholds are at least this in the division by them.
_MIN_THRESHOLD = 1e-30
# Arrow adds a number to the task's name in the name of a file of rows.
_FILE_NUMBER = re.compile(r"-\d+$")


def task_of(uri: str) -> str:
    """Return the name of the task that wrote a file of rows."""
    return _FILE_NUMBER.sub("", PurePosixPath(uri).name.removesuffix(".parquet"))


class RankedImage(NamedTuple):
    """An image with a score.

    Args:
        margin: how far its score is above its threshold, comparable over models.
        image_id: breaks ties.
        task: name of the task that wrote its row.
    """

    margin: float
    image_id: int
    task: str


@dataclass(frozen=True)
class RowSummary:
    """Counts of rows, and some of them. Summaries of different rows add up, in any order.

    Args:
        categories: counts of rows by category.
        errors: rows without a score, by error kind.
        error_examples: the first of these rows by their URIs, a line each.
        bytes_read: size of all image files.
        ranked: the most anomalous images, in that order.
        tasks: names of the tasks that wrote the rows, sorted.
    """

    categories: dict[str, CategoryCounts] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    error_examples: list[str] = field(default_factory=list)
    bytes_read: int = 0
    max_ranked: int = 0
    ranked: list[RankedImage] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(counts.rows for counts in self.categories.values())

    @property
    def anomalous(self) -> int:
        return sum(counts.anomalous for counts in self.categories.values())

    @classmethod
    def of_rows(cls, rows: pa.Table, task: str, max_ranked: int) -> RowSummary:
        """Summarize rows of schema OUTPUT that one task wrote, of which COLUMNS are read; rank this many images."""
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
        scored = rows.select(["image_id", *_VALUES]).filter(pc.field("score").is_valid())
        images = zip(_margins(scored).tolist(), scored["image_id"].to_pylist(), strict=True)
        return cls(
            categories=_by_name(categories),
            errors=_by_name(dict(+errors)),
            error_examples=_first_examples(": ".join(row[name] for name in _ERROR_COLUMNS) for row in failures),
            bytes_read=bytes_read,
            max_ranked=max_ranked,
            ranked=[RankedImage(*image, task) for image in heapq.nlargest(max_ranked, images)],
            tasks=[task],
        )

    @classmethod
    def total(cls, summaries: Iterable[RowSummary], max_ranked: int) -> RowSummary:
        """Add up summaries of different rows.

        The total ranks at most `max_ranked` images, and no more than its shortest summary: beyond that, the order is
        unknown.
        """
        categories: defaultdict[str, CategoryCounts] = defaultdict(CategoryCounts)
        errors: Counter[str] = Counter()
        examples: list[str] = []
        bytes_read = 0
        ranked: list[RankedImage] = []
        tasks: set[str] = set()
        for each in summaries:
            for name, counts in each.categories.items():
                categories[name] += counts
            errors.update(each.errors)
            examples = _first_examples([*examples, *each.error_examples])
            bytes_read += each.bytes_read
            max_ranked = min(max_ranked, each.max_ranked)
            ranked = heapq.nlargest(max_ranked, [*ranked, *each.ranked])
            tasks.update(each.tasks)
        return cls(
            categories=_by_name(categories),
            errors=_by_name(dict(errors)),
            error_examples=examples,
            bytes_read=bytes_read,
            max_ranked=max_ranked,
            ranked=ranked,
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


def _margins(scored: pa.Table) -> npt.NDArray[np.float64]:
    """Compute how far scores are above their thresholds, comparable over models.

    Take the difference where the score has a view's: its scale is that of quantiles, the same in all models. Otherwise
    divide the difference by the threshold.
    """
    scores, thresholds = (scored[name].cast(pa.float64()).to_numpy() for name in ("score", "threshold"))
    has_scale = np.any([scored[name].is_valid().to_numpy() for name in VIEW_SCORES], axis=0)
    scales = np.where(has_scale, 1.0, np.maximum(np.abs(thresholds), _MIN_THRESHOLD))
    above: npt.NDArray[np.float64] = (scores - thresholds) / scales
    return above
