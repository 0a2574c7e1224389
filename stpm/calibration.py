"""What held-out normals say: a threshold that needs no defects, and a heatmap scale that never moves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class HeatmapScale:
    """The fixed range of a model's heatmaps, in units of the anomaly map, both above 0.

    `low` (the median pixel of held-out normals) is drawn as 0 and `high` as 1, logarithmically. `high` lies as
    far above the largest pixel of any held-out normal as that lies above `low`, so the middle of the scale is the
    edge of what is normal.
    """

    low: float
    high: float

    def apply(self, anomaly_map: Floats) -> npt.NDArray[np.uint8]:
        """Grey levels 0 to 255 of a map of any shape."""
        span = np.log(self.high / self.low)
        position = np.log(np.maximum(anomaly_map, self.low) / self.low) / span
        return np.round(np.clip(position, 0.0, 1.0) * 255).astype(np.uint8)


@dataclass(frozen=True)
class Calibration:
    """Scores of held-out normals, ascending float32 of length n, and the model's heatmap scale."""

    scores: npt.NDArray[np.float32]
    scale: HeatmapScale

    def p_values(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Conformal p-value p = (1 + #{calibration scores ≥ s}) / (n + 1), in (0, 1], for each score."""
        return p_values(self.scores, scores)

    def threshold(self, false_alarm_rate: float) -> float:
        """The score that an image must exceed to be called anomalous; see `threshold`."""
        return threshold(self.scores, false_alarm_rate)


def p_values(calibration: npt.NDArray[np.float32], scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """See `Calibration.p_values` (Vovk et al., Algorithmic Learning in a Random World, section 2.2)."""
    at_least = len(calibration) - np.searchsorted(calibration, scores, side="left")
    return ((1 + at_least) / (len(calibration) + 1)).astype(np.float32)


def threshold(calibration: npt.NDArray[np.float32], false_alarm_rate: float) -> float:
    """The calibration score s* such that a score above it has p ≤ the rate, on exchangeable scores.

    n held-out normals support no rate below 1/(n+1); for a finer one the largest calibration score is returned,
    whose rate is 1/(n+1).
    """
    n = len(calibration)
    allowed = max(int(false_alarm_rate * (n + 1) + 1e-9), 1) - 1
    return float(calibration[n - 1 - min(allowed, n - 1)])


def finest_rate(n: int) -> float:
    """The smallest false-alarm rate that n held-out normals support."""
    return 1.0 / (n + 1)


def calibrate(anomaly_maps: npt.NDArray[np.float32]) -> Calibration:
    """From the maps of held-out normals, (n, H, W) float32, to their calibration."""
    scores = np.sort(anomaly_maps.reshape(len(anomaly_maps), -1).max(axis=1))
    tiny = np.finfo(np.float32).tiny
    low = max(float(np.median(anomaly_maps)), float(tiny))
    edge = max(float(scores[-1]), low * (1 + 1e-6))
    return Calibration(scores.astype(np.float32), HeatmapScale(low=low, high=edge * (edge / low)))
