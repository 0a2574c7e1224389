"""Count and sample the rows of a night, in batches."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stpm.data.image_statistics import COMPARED
from stpm.line.night import ErrorExample
from stpm.line.verdict import Sample
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import read_batches

# Images of a category whose p-values and statistics are compared: enough for any change that matters.
SAMPLE = 5000
_EXAMPLES_OF_A_KIND = 3
# Rows that are counted at a time. A file may have a few hundred rows, of as many categories.
_BATCH = 100_000
_VALUES = ["p_value", *COMPARED]
_COLUMNS = ["image_id", "uri", "category", "model_id", "is_anomalous", "error_kind", "error_message", *_VALUES]


class RowCounter:
    """Counts and samples one category's rows. They are added a batch at a time, in any order.

    The sample is the rows with the smallest image ids. An id is a hash: the sample is random, and the same after a run
    was cut off.
    """

    def __init__(self) -> None:
        self.images = self.alarms = 0
        self.errors = Counter[str]()
        self.models = Counter[str]()
        self._ids = np.empty(0, np.int64)
        self._values = np.empty((0, len(_VALUES)), np.float32)

    def add(self, rows: pa.Table) -> None:
        """Add rows of this category."""
        scored = rows.filter(pc.field("error_kind") == "")
        self.images += rows.num_rows
        self.alarms += pc.sum(scored["is_anomalous"]).as_py() or 0
        self.errors.update(rows.filter(pc.field("error_kind") != "")["error_kind"].to_pylist())
        self.models.update(scored["model_id"].to_pylist())
        values = np.stack([scored[name].to_numpy() for name in _VALUES], axis=1, dtype=np.float32)
        self._ids = np.concatenate([self._ids, scored["image_id"].to_numpy()])
        self._values = np.concatenate([self._values, values])
        if len(self._ids) > 2 * SAMPLE:
            self._keep_sample()

    def sample(self) -> Sample:
        """Return the p-values and statistics of the sampled images, float32."""
        self._keep_sample()
        p_values, *statistics = self._values.T
        return Sample(p_values, dict(zip(COMPARED, statistics, strict=True)))

    def _keep_sample(self) -> None:
        order = np.argsort(self._ids, kind="stable")[:SAMPLE]
        self._ids, self._values = self._ids[order], self._values[order]


def read_rows(outputs: Iterable[RunOutput]) -> tuple[Mapping[str, RowCounter], tuple[ErrorExample, ...]]:
    """Count and sample the rows of a night.

    Returns:
        The counts and samples by category, and a few examples of each kind of error.

    Raises:
        DataError: if a file of rows is damaged.
    """
    categories: defaultdict[str, RowCounter] = defaultdict(RowCounter)
    examples: defaultdict[str, list[ErrorExample]] = defaultdict(list)
    for rows in _tables(outputs):
        ordered, start = rows.sort_by("category"), 0
        for counted in pc.value_counts(ordered["category"]).to_pylist():
            categories[counted["values"]].add(ordered.slice(start, counted["counts"]))
            start += counted["counts"]
        failed = rows.filter(pc.field("error_kind") != "")
        for kind in pc.unique(failed["error_kind"]).to_pylist():
            wanted = _EXAMPLES_OF_A_KIND - len(examples[kind])
            for row in failed.filter(pc.field("error_kind") == kind).slice(0, wanted).to_pylist():
                examples[kind].append(
                    ErrorExample(kind=kind, category=row["category"], uri=row["uri"], message=row["error_message"])
                )
    return categories, tuple(example for kind in sorted(examples) for example in examples[kind])


def _tables(outputs: Iterable[RunOutput]) -> Iterator[pa.Table]:
    waiting: list[pa.RecordBatch] = []
    for batch in chain.from_iterable(read_batches(output, _COLUMNS) for output in outputs):
        waiting.append(batch)
        if sum(each.num_rows for each in waiting) >= _BATCH:
            yield pa.Table.from_batches(waiting)
            waiting = []
    if waiting:
        yield pa.Table.from_batches(waiting)
