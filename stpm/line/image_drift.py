"""Compare the statistics of a night's images with those of the images that the model was fitted on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from stpm.data.image_statistics import COMPARED
from stpm.line.change import Change, Limits, percent
from stpm.line.significance import FloatArray, compare_samples, exceedances

# For each statistic, a test of all images, of those above every good image, and of those below.
TESTS = 3 * len(COMPARED)

# How far the median moved, in standard deviations of the good images.
_DEVIATIONS = Limits(1.0, 2.0)
# Fraction of a night's images that are beyond all good ones, if the median did not move.
_PART_OF_NIGHT = Limits(0.1, 0.3)
# Fraction of a night's images that are one picture.
_REPEATED = Limits(0.1, 0.5)
_MIN_REPEATED = 3
# A larger change is not written as a number: it has no meaning if training images are almost black.
_MAX_WRITTEN = 10.0


class _Statistic(NamedTuple):
    """How a change of a statistic is measured and described.

    Args:
        subject: beginning of a sentence about the images.
        more: comparative for a rise.
        less: comparative for a fall.
        cause: question about what to look at.
        is_relative: the change is divided by the good images' median.
    """

    limits: Limits
    subject: str
    more: str
    less: str
    cause: str
    is_relative: bool = True

    def change(self, middle: float, good: float) -> float:
        """Return the change of a median, in the units of the limits."""
        return (middle - good) / (max(abs(good), 1e-9) if self.is_relative else 1.0)

    def describe(self, change: float) -> str:
        """Describe a change, given in units: the beginning of a sentence."""
        size = percent(abs(change)) if abs(change) <= _MAX_WRITTEN else f"more than {percent(_MAX_WRITTEN)}"
        return f"{self.subject} {size} {self.more if change > 0 else self.less}"


_SIZE, _COLOUR, _POSITION = Limits(0.02, 0.1), Limits(0.03, 0.06), Limits(0.02, 0.04)
_IMAGES, _CONTENT = "the images are", "the content lies"
_RESOLUTION = "has the camera's resolution changed?"
_LAMP = "has the lamp or the exposure changed?"
_LIGHT = "has the light changed, or is the lens dirty?"
_FOCUS = "has the focus changed, or is the lens dirty?"
_WHITE_BALANCE = "has the lamp or the white balance changed?"
_MOVED = "was the camera moved?"
_RIGHT, _LEFT = "of the width further right", "of the width further left"
_DOWN, _UP = "of the height further down", "of the height further up"

_STATISTICS = {
    "width": _Statistic(_SIZE, _IMAGES, "wider", "narrower", _RESOLUTION),
    "height": _Statistic(_SIZE, _IMAGES, "taller", "less tall", _RESOLUTION),
    "brightness": _Statistic(Limits(0.03, 0.08), _IMAGES, "brighter", "darker", _LAMP),
    "contrast": _Statistic(Limits(0.08, 0.2), "their contrast is", "higher", "lower", _LIGHT),
    "sharpness": _Statistic(Limits(0.15, 0.3), "their sharpness is", "higher", "lower", _FOCUS),
    "red_to_green": _Statistic(_COLOUR, _IMAGES, "redder", "less red", _WHITE_BALANCE),
    "blue_to_green": _Statistic(_COLOUR, _IMAGES, "bluer", "less blue", _WHITE_BALANCE),
    "position_x": _Statistic(_POSITION, _CONTENT, _RIGHT, _LEFT, _MOVED, is_relative=False),
    "position_y": _Statistic(_POSITION, _CONTENT, _DOWN, _UP, _MOVED, is_relative=False),
}


def find_copies(statistics: Mapping[str, FloatArray], images: int) -> tuple[npt.NDArray[np.intp], Change | None]:
    """Find images that show the same picture, among one image or more: a random sample of a night's.

    All statistics are equal to the last bit for two copies of one picture, and never for two pictures.

    Returns:
        The index of one image of each picture, ascending; and the change that many of the night's images are copies.
    """
    rows = np.stack([statistics[name] for name in COMPARED], axis=1)
    _, first, counts = np.unique(rows, axis=0, return_index=True, return_counts=True)
    distinct, commonest = np.sort(first), int(counts.max())
    fraction = commonest / len(rows)
    if commonest < _MIN_REPEATED or _REPEATED.level(fraction) == "fine":
        return distinct, None
    count = "all" if commonest == len(rows) else f"{round(fraction * images):,} of"
    text = f"{count} {images:,} images are the same picture: does the camera deliver new ones?"
    return distinct, _REPEATED.change("repeated", fraction, 0.0, text)


def compare_statistics(night: Mapping[str, FloatArray], good: Mapping[str, FloatArray]) -> Iterator[Change]:
    """Compare a night's images, one or more, with good ones, a statistic at a time; a p-value is that of one test.

    Report that the night's median moved, or else images, too few to move it, that lie far beyond all good ones on one
    side.
    """
    for name, statistic in _STATISTICS.items():
        limits, values, usual = statistic.limits, night[name], good[name]
        middle, good_middle = float(np.median(values)), float(np.median(usual))
        change = statistic.change(middle, good_middle)
        if limits.level(abs(change)) != "fine":
            # The standard deviation, estimated so that single odd images do not count.
            deviation = max(float(stats.median_abs_deviation(usual, scale="normal")), 1e-9)
            highest = _DEVIATIONS.level(abs(middle - good_middle) / deviation)
            if highest != "fine":
                text = f"{statistic.describe(change)} than in training: {statistic.cause}"
                yield limits.change(name, abs(change), compare_samples(values, usual)[1], text, highest)
                continue
        for beyond in (values[values > usual.max()], values[values < usual.min()]):
            fraction = len(beyond) / len(values)
            if _PART_OF_NIGHT.level(fraction) == "fine":
                continue
            change = statistic.change(float(np.median(beyond)), good_middle)
            if abs(change) >= limits.act:
                what = f"{statistic.describe(change)}; {statistic.cause}"
                text = f"{percent(fraction)} of the images are unlike every training image: {what}"
                p_value = exceedances(len(beyond), len(values), len(usual))
                yield _PART_OF_NIGHT.change(name, fraction, p_value, text)
