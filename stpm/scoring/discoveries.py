"""The discoveries of a run: which of its images a false discovery rate allows to call defects."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.dataset as ds

from stpm.method.false_discovery import Discoveries, find_discoveries
from stpm.models.record import ModelRecord
from stpm.scoring.output import RunOutput

_COLUMNS = ["category", "p_value"]


def count_p_values(output: RunOutput) -> dict[str, Counter[float]]:
    """Count the images of a run by category and p-value, a batch at a time.

    A category has at most as many p-values as its calibration has images, and one more.
    """
    counts: defaultdict[str, Counter[float]] = defaultdict(Counter)
    for batch in output.dataset().to_batches(_COLUMNS, filter=ds.field("p_value").is_valid()):
        groups = pa.Table.from_batches([batch]).group_by(_COLUMNS).aggregate([([], "count_all")])
        for group in groups.to_pylist():
            counts[group["category"]][group["p_value"]] += group["count_all"]
    return dict(counts)


def run_discoveries(output: RunOutput, records: Mapping[str, ModelRecord], rate: float) -> Discoveries:
    """Find the discoveries among all images of a run, which the models of these records scored."""
    calibration = {name: record.fit.calibration_count for name, record in records.items()}
    return find_discoveries(count_p_values(output), calibration, rate)
