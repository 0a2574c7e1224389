"""The alarms of good images, by a category's current model and by a new one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stpm.method.calibration import threshold


@dataclass(frozen=True)
class Alarms:
    """The threshold of a model at a false-alarm rate, and how many good images score above it.

    Args:
        threshold: score above which an image is called anomalous.
        held_out: number of calibration images that no person added.
        held_out_alarms: how many of them score above the threshold.
        added_alarms: how many of the new images score above it.
    """

    threshold: float
    held_out: int
    held_out_alarms: int
    added_alarms: int

    @classmethod
    def count(cls, calibration: pa.Table, added: npt.NDArray[np.float32], false_alarm_rate: float) -> Alarms:
        """Count the alarms of a calibration, and of the scores of added images by the same model, (n,)."""
        scores = calibration["score"].to_numpy()
        held_out = scores[~calibration["is_added"].to_numpy()]
        limit = threshold(scores, false_alarm_rate)
        return cls(limit, len(held_out), int((held_out > limit).sum()), int((added > limit).sum()))


def describe_change(before: Alarms, after: Alarms, added: int) -> str:
    """Write the alarms of the current model and of a new one, over `added` new images, as a line."""
    return (
        f"threshold {before.threshold:.4g} before, {after.threshold:.4g} after; held-out good images above it "
        f"{before.held_out_alarms} of {before.held_out} before, {after.held_out_alarms} of {after.held_out} after; "
        f"added good images above it {before.added_alarms} of {added} before, {after.added_alarms} of {added} after"
    )
