"""The discoveries of a run: which of its images a false discovery rate allows to call defects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from stpm.method.false_discovery import Discoveries, find_discoveries
from stpm.models.record import ModelRecord
from stpm.scoring.row_summary import RowSummary


def run_discoveries(segments: Iterable[RowSummary], records: Mapping[str, ModelRecord], rate: float) -> Discoveries:
    """Find the discoveries among all images of a run, which the models of these records scored."""
    calibration = {name: record.fit.calibration_count for name, record in records.items()}
    return find_discoveries(RowSummary.total(segments, 0).p_values, calibration, rate)
