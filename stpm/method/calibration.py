"""What held-out normals say: a threshold that needs no defects, and a heatmap scale that never moves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stpm.errors import ConfigError, join_first

Floats = npt.NDArray[np.floating]

_COMMON = 0.99
_BEYOND = 5.0
_LOW = 0.9
_HIGH = 0.995
# A part that hardly varies on normal images would outweigh all others: its scale is at least this part of its values.
_LEAST_SPREAD = 0.05


@dataclass(frozen=True)
class HeatmapScale:
    """The fixed range of a model's heatmaps, in units of the anomaly map, low < edge.

    `low` (the 99th percentile of held-out normals' pixels) and below are drawn as 0; up to `edge` (the largest pixel of
    any held-out normal), drawn as one half, grey levels rise in proportion, and then with the logarithm: five times as
    far above `low` as `edge` and beyond are drawn as 1. So the middle of the scale means the same for every model: here
    ends what was seen on good images.
    """

    low: float
    edge: float

    def apply(self, anomaly_map: Floats) -> npt.NDArray[np.uint8]:
        """Grey levels 0 to 255 of a map of any shape."""
        excess = (anomaly_map - self.low) / (self.edge - self.low)
        beyond = 1 + np.log(np.clip(excess, 1.0, _BEYOND)) / np.log(_BEYOND)
        levels: npt.NDArray[np.uint8] = np.round(127.5 * np.where(excess < 1, np.maximum(excess, 0.0), beyond)).astype(
            np.uint8
        )
        return levels


@dataclass(frozen=True)
class PartScale:
    """Quantiles of a part's distances on held-out normals: fusion brings `low` (0.9) to 0 and `high` (0.995) to 1."""

    low: float
    high: float

    @property
    def spread(self) -> float:
        """Above 0, also where nothing varies."""
        return max(self.high - self.low, _LEAST_SPREAD * abs(self.high), 1e-6)


def part_scale(values: Sequence[Floats]) -> PartScale:
    """The scale of a part, from its distances on each of some held-out normals, at least one."""
    # Not interpolated: the same images twice have the same quantiles, and equal images score the same.
    low, high = np.quantile(np.concatenate(values), (_LOW, _HIGH), method="inverted_cdf")
    return PartScale(float(low), float(high))


def part_scales_without_each(values: Sequence[Floats]) -> list[PartScale]:
    """For each of at least two held-out normals, the scale that the others give.

    An image that had a part in its own scale would look more normal than any image that comes later.
    """
    every = np.concatenate(values)
    order = np.argsort(every, kind="stable")
    ordered = every[order]
    places = np.empty(len(every), np.int64)
    places[order] = np.arange(len(every))
    ends = np.cumsum([len(each) for each in values])
    scales = []
    for own in np.split(places, ends[:-1]):
        # How many values of others lie before each of its own.
        others_before = np.sort(own) - np.arange(len(own))
        ranks = [max(math.ceil((len(every) - len(own)) * share - 1), 0) for share in (_LOW, _HIGH)]
        low, high = ordered[ranks + np.searchsorted(others_before, ranks, side="right")]
        scales.append(PartScale(float(low), float(high)))
    return scales


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


def check_rate(false_alarm_rate: float) -> None:
    """Raises ConfigError if it is not a share."""
    if not 0 < false_alarm_rate < 1:
        raise ConfigError(f"false-alarm-rate is {false_alarm_rate}; give a share between 0 and 1")


def normals_for(false_alarm_rate: float) -> int:
    """The fewest held-out normals that support a rate: the smallest n with 1/(n+1) at most the rate."""
    return math.ceil(1 / false_alarm_rate - 1 - 1e-9)


@dataclass(frozen=True)
class Normals:
    """The good images of a category: how many there are, and how many of them calibrate its model."""

    good: int
    calibrating: int


def shortfall(counts: Mapping[str, Normals], false_alarm_rate: float) -> str:
    """A warning that names the models that too few good images calibrate for a rate; empty if there are none.

    Args:
        counts: by category.
        false_alarm_rate: in (0, 1).
    """
    needed = normals_for(false_alarm_rate)
    few = {name: normals for name, normals in counts.items() if normals.calibrating < needed}
    if not few:
        return ""
    shown = [
        f"{name} has {n.calibrating} of its {n.good} good images and supports {1 / (n.calibrating + 1):.3f}"
        for name, n in few.items()
    ]
    remedies = ["raise --false-alarm-rate"]
    if any(n.good < needed for n in few.values()):
        remedies.insert(0, f"give at least {needed} good images and fit with --calibration-folds 5")
    if any(n.good >= needed for n in few.values()):
        remedies.insert(
            0, f"where there are {needed} good images, fit with --calibration-folds 5: all of them calibrate"
        )
    return (
        f"warning: false-alarm-rate {false_alarm_rate:g} takes {needed} good images to calibrate on; "
        f"{join_first(shown, separator=', ')}. "
        f"There, the largest normal score is the threshold. To change that, {'; or '.join(remedies)}"
    )


class HeatmapRange:
    """The heatmap scale of maps that come one after the other.

    It is exact, and of all pixels only the largest are kept: about 20 bytes for each of one percent of them.

    Args:
        pixels: of all maps together, at least one.
    """

    def __init__(self, pixels: int) -> None:
        self._position = _COMMON * (pixels - 1)
        self._kept = pixels - math.floor(self._position)
        self._parts: list[npt.NDArray[np.float32]] = []
        self._count = 0
        self._least = -math.inf

    def add(self, anomaly_map: npt.NDArray[np.float32]) -> None:
        """Take in a map of any shape."""
        self._parts.append(anomaly_map[anomaly_map >= self._least])
        self._count += len(self._parts[-1])
        if self._count > 2 * self._kept:
            self._largest()

    def scale(self) -> HeatmapScale:
        """The scale of all maps: `low` is interpolated linearly between two pixels, as NumPy's default is."""
        ordered = np.sort(self._largest())
        below, above = ordered[0], ordered[min(1, len(ordered) - 1)]
        share = self._position - math.floor(self._position)
        low = float(below + (above - below) * share if share < 0.5 else above - (above - below) * (1 - share))
        return HeatmapScale(low, max(float(ordered[-1]), low + _least_step(low)))

    def _largest(self) -> npt.NDArray[np.float32]:
        pixels = np.concatenate(self._parts)
        if len(pixels) > self._kept:
            pixels.partition(len(pixels) - self._kept)
            pixels = pixels[-self._kept :].copy()
            self._least = pixels[0]
        self._parts, self._count = [pixels], len(pixels)
        return pixels


def _least_step(value: float) -> float:
    """So small that it does not matter, and so large that float32 tells a value from its sum with it."""
    return max(1e-6 * abs(value), 1e-30)
