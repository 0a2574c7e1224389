"""The discoveries of a run: which of its images a false discovery rate allows to call defects."""

from __future__ import annotations

from collections.abc import Mapping

from stpm.method.false_discovery import Discoveries, find_discoveries
from stpm.models.record import ModelRecord


def run_discoveries(
    p_values: Mapping[str, Mapping[float, int]], records: Mapping[str, ModelRecord], rate: float
) -> Discoveries:
    """Find the discoveries among all images of a run, which the models of these records scored.

    Args:
        p_values: number of images by category and p-value.
        records: by category.
        rate: false discovery rate.
    """
    calibration = {name: record.fit.calibration_count for name, record in records.items()}
    return find_discoveries(p_values, calibration, rate)
