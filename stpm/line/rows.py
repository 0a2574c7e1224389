"""Count and sample the rows of a night, in batches."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import pyarrow as pa
import pyarrow.compute as pc

from stpm.data.image_statistics import COMPARED
from stpm.line.verdict import Sample
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import read_batches
from stpm.scoring.schema import OUTPUT

# Images of a category whose p-values and statistics are compared: enough for any change that matters.
SAMPLE = 5000
_EXAMPLES_OF_A_KIND = 3
# Rows that are counted at a time. A file may have a few hundred rows, of as many categories.
_BATCH = 100_000
_SAMPLED = ["image_id", "p_value", *COMPARED]
# Of `Night.error_examples`, and the columns that have them.
_EXAMPLE = {"kind": "error_kind", "category": "category", "uri": "uri", "message": "error_message"}
_COLUMNS = [*_SAMPLED, "model_id", "is_anomalous", *_EXAMPLE.values()]


class RowCounter:
    """Counts and samples one category's rows. They are added a batch at a time, in any order.

    The sample is the rows with the smallest image ids. An id is a hash: the sample is random, and the same after a run
    was cut off.
    """

    def __init__(self) -> None:
        self.images = self.alarms = 0
        self.errors, self.models = Counter[str](), Counter[str]()
        self._sampled = [pa.schema(map(OUTPUT.field, _SAMPLED)).empty_table()]

    def add(self, rows: pa.Table) -> None:
        """Add rows of this category."""
        scored = rows.filter(pc.field("error_kind") == "")
        self.images += rows.num_rows
        self.alarms += pc.sum(scored["is_anomalous"]).as_py() or 0
        self.errors.update(rows.filter(pc.field("error_kind") != "")["error_kind"].to_pylist())
        self.models.update(scored["model_id"].to_pylist())
        self._sampled.append(scored.select(_SAMPLED))
        if sum(each.num_rows for each in self._sampled) > 2 * SAMPLE:
            self._sampled = [self._smallest_ids()]

    def sample(self) -> Sample:
        """Return the p-values and statistics of the sampled images."""
        rows = self._smallest_ids()
        return Sample(rows["p_value"].to_numpy(), {name: rows[name].to_numpy() for name in COMPARED})

    def _smallest_ids(self) -> pa.Table:
        return pa.concat_tables(self._sampled).sort_by("image_id").slice(0, SAMPLE)


def read_rows(outputs: Iterable[RunOutput]) -> tuple[Mapping[str, RowCounter], tuple[dict[str, str], ...]]:
    """Count and sample the rows of a night.

    Returns:
        The counts and samples by category, and a few examples of each kind of error, as `Night` has them.

    Raises:
        DataError: if a file of rows is damaged.
    """
    categories: defaultdict[str, RowCounter] = defaultdict(RowCounter)
    examples: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    for rows in _tables(outputs):
        ordered, start = rows.sort_by("category"), 0
        for counted in pc.value_counts(ordered["category"]).to_pylist():
            categories[counted["values"]].add(ordered.slice(start, counted["counts"]))
            start += counted["counts"]
        failed = rows.filter(pc.field("error_kind") != "").select([*_EXAMPLE.values()]).rename_columns([*_EXAMPLE])
        for kind in pc.unique(failed["kind"]).to_pylist():
            wanted = _EXAMPLES_OF_A_KIND - len(examples[kind])
            examples[kind] += failed.filter(pc.field("kind") == kind).slice(0, wanted).to_pylist()
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
