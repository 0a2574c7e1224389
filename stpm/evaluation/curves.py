"""What a report draws of one category: curves thinned to what a picture shows, and score histograms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_curve

from stpm.evaluation.metrics import Flags, Scores
from stpm.evaluation.pixels import PixelCounts

Points = tuple[tuple[float, ...], tuple[float, ...]]

_POINTS = 200
_BINS = 30
# Largest over smallest score, from which on the bins are equally wide in the logarithm.
_WIDE = 30.0


@dataclass(frozen=True)
class Histogram:
    """Images by score: `edges` (bins + 1) ascending, `counts` by label, the model's threshold."""

    edges: tuple[float, ...]
    counts: dict[str, tuple[int, ...]]
    threshold: float
    logarithmic: bool


@dataclass(frozen=True)
class Curves:
    """False positive rate (x) against recall or per-region overlap (y); None where it is undefined."""

    image_roc: Points | None = None
    pixel_roc: Points | None = None
    pixel_pro: Points | None = None
    scores: Histogram | None = None


def image_roc(is_defect: Flags, scores: Scores) -> Points:
    """Of images of both classes."""
    x, y, _ = roc_curve(is_defect, scores)
    return thinned(x, y)


def pixel_roc(counts: PixelCounts) -> Points:
    return thinned(*counts.roc_curve())


def pixel_pro(counts: PixelCounts, limit: float) -> Points:
    return thinned(*counts.pro_curve(limit))


def thinned(x: npt.NDArray[np.floating], y: npt.NDArray[np.floating]) -> Points:
    """At most some points of an ascending curve, spread over its length: both its steep and its flat parts show."""
    length = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(x), np.diff(y)))])
    wanted = np.linspace(0, length[-1], _POINTS)
    chosen = np.unique(np.concatenate([[0, len(x) - 1], np.searchsorted(length, wanted).clip(max=len(x) - 1)]))
    return tuple(np.round(x[chosen], 5).tolist()), tuple(np.round(y[chosen], 5).tolist())


def histogram(scores: Scores, labels: Sequence[str], threshold: float) -> Histogram | None:
    """Images by score and label; None if there is none."""
    if not len(scores):
        return None
    low, high = float(min(scores.min(), threshold)), float(max(scores.max(), threshold))
    logarithmic = low > 0 and high / low > _WIDE
    # Pads a single value into a range; the outer edges are then moved outwards, past rounding.
    edges = np.geomspace(low, high, _BINS + 1) if logarithmic else np.linspace(low, high + (high == low), _BINS + 1)
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    names = np.asarray(labels)
    counts = {str(name): np.histogram(scores[names == name], edges)[0] for name in np.unique(names)}
    return Histogram(tuple(edges.tolist()), {n: tuple(map(int, c)) for n, c in counts.items()}, threshold, logarithmic)
