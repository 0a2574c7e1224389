"""Count and sample the rows of a night, in batches."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stpm.data.image_statistics import COMPARED
from stpm.monitoring.drift import Sample
from stpm.monitoring.nights import ErrorExample
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import read_batches

# Images of a category whose p-values and statistics are compared: enough for any change that matters.
SAMPLE = 5000
_EXAMPLES_OF_A_KIND = 3
# Rows that are read at a time. A file may have a few hundred rows, of as many categories.
_BATCH = 100_000
_COLUMNS = ["image_id", "uri", "category", "model_id", "is_anomalous", "error_kind", "error_message", "p_value"]


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
        self._values = np.empty((0, 1 + len(COMPARED)), np.float32)

    def add(self, rows: pa.Table) -> None:
        """Add rows of this category."""
        self.images += rows.num_rows
        self.alarms += pc.sum(rows["is_anomalous"]).as_py() or 0
        scored = rows.filter(pc.equal(rows["error_kind"], ""))
        self.errors.update(pc.filter(rows["error_kind"], pc.not_equal(rows["error_kind"], "")).to_pylist())
        self.models.update(scored["model_id"].to_pylist())
        values = [scored[name].to_numpy() for name in ("p_value", *COMPARED)]
        self._ids = np.concatenate([self._ids, scored["image_id"].to_numpy()])
        self._values = np.concatenate([self._values, np.stack(values, axis=1).astype(np.float32)])
        if len(self._ids) > 2 * SAMPLE:
            self._keep_sample()

    def sample(self) -> Sample:
        """Return the p-values and statistics of the sampled images, float32."""
        self._keep_sample()
        return Sample(self._values[:, 0], dict(zip(COMPARED, self._values[:, 1:].T, strict=True)))

    def _keep_sample(self) -> None:
        order = np.argsort(self._ids, kind="stable")[:SAMPLE]
        self._ids, self._values = self._ids[order], self._values[order]


def read_rows(outputs: Iterable[RunOutput]) -> tuple[Mapping[str, RowCounter], tuple[ErrorExample, ...]]:
    """Count and sample the rows of a night, a batch at a time.

    Returns:
        The counts and samples by category, and a few examples of each kind of error.

    Raises:
        DataError: if a file of rows is damaged.
    """
    categories: defaultdict[str, RowCounter] = defaultdict(RowCounter)
    examples: defaultdict[str, list[ErrorExample]] = defaultdict(list)
    for rows in _batches(outputs):
        ordered = rows.sort_by("category")
        start = 0
        for counted in pc.value_counts(ordered["category"]).to_pylist():
            categories[counted["values"]].add(ordered.slice(start, counted["counts"]))
            start += counted["counts"]
        _add_examples(examples, rows)
    by_kind = [examples[kind] for kind in sorted(examples)]
    return categories, tuple(example for found in by_kind for example in found)


def _batches(outputs: Iterable[RunOutput]) -> Iterator[pa.Table]:
    for output in outputs:
        # One run may be partitioned, and another not: their schemas differ.
        pending: list[pa.RecordBatch] = []
        for batch in read_batches(output, [*_COLUMNS, *COMPARED]):
            pending.append(batch)
            if sum(waiting.num_rows for waiting in pending) >= _BATCH:
                yield pa.Table.from_batches(pending)
                pending = []
        if pending:
            yield pa.Table.from_batches(pending)


def _add_examples(examples: defaultdict[str, list[ErrorExample]], rows: pa.Table) -> None:
    failed = rows.filter(pc.not_equal(rows["error_kind"], ""))
    for kind in pc.unique(failed["error_kind"]).to_pylist():
        if (wanted := _EXAMPLES_OF_A_KIND - len(examples[kind])) > 0:
            for row in failed.filter(pc.equal(failed["error_kind"], kind)).slice(0, wanted).to_pylist():
                example = ErrorExample(
                    kind=kind, category=row["category"], uri=row["uri"], message=row["error_message"]
                )
                examples[kind].append(example)
