"""Compare the statistics of a night's images with those of the images that the model was fitted on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stpm.data.image_statistics import COMPARED
from stpm.monitoring.change import LEVELS, Change, Limits, percent
from stpm.monitoring.significance import FloatArray, compare_samples, exceedances

# For each statistic, a test of all images, of those above every good image, and of those below.
TESTS = 3 * len(COMPARED)

# How far the median moved, in standard deviations of the good images.
_DEVIATIONS = Limits(1.0, 2.0)
# Share of a night's images that are beyond all good ones, if the median did not move.
_PART_OF_NIGHT = Limits(0.1, 0.3)
# Share of a night's images that are one picture.
_REPEATED = Limits(0.1, 0.5)
_MIN_REPEATED = 3
# A larger change is not written as a number: it has no meaning if training images are almost black.
_MOST = 10.0


class _Statistic(NamedTuple):
    """How a change of a statistic is measured and described.

    Args:
        limits: of the change.
        subject: beginning of a sentence about the images.
        more: comparative for a rise.
        less: comparative for a fall.
        cause: question about what to look at.
        is_relative: the change is a share of the good images' median, instead of in the statistic's own unit.
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
        size = percent(abs(change)) if abs(change) <= _MOST else f"more than {percent(_MOST)}"
        return f"{self.subject} {size} {self.more if change > 0 else self.less}"


_SIZE = Limits(0.02, 0.1)
_BRIGHTNESS = Limits(0.03, 0.08)
_CONTRAST = Limits(0.08, 0.2)
_SHARPNESS = Limits(0.15, 0.3)
_COLOUR = Limits(0.03, 0.06)
_POSITION = Limits(0.02, 0.04)
_IMAGES, _CONTENT = "the images are", "the content lies"
_RESOLUTION = "has the camera's resolution changed?"
_LAMP = "has the lamp or the exposure changed?"
_WHITE_BALANCE = "has the lamp or the white balance changed?"
_MOVED = "was the camera moved?"

_STATISTICS = {
    "width": _Statistic(_SIZE, _IMAGES, "wider", "narrower", _RESOLUTION),
    "height": _Statistic(_SIZE, _IMAGES, "taller", "less tall", _RESOLUTION),
    "brightness": _Statistic(_BRIGHTNESS, _IMAGES, "brighter", "darker", _LAMP),
    "contrast": _Statistic(
        _CONTRAST, "their contrast is", "higher", "lower", "has the light changed, or is the lens dirty?"
    ),
    "sharpness": _Statistic(
        _SHARPNESS, "their sharpness is", "higher", "lower", "has the focus changed, or is the lens dirty?"
    ),
    "red_to_green": _Statistic(_COLOUR, _IMAGES, "redder", "less red", _WHITE_BALANCE),
    "blue_to_green": _Statistic(_COLOUR, _IMAGES, "bluer", "less blue", _WHITE_BALANCE),
    "position_x": _Statistic(
        _POSITION, _CONTENT, "of the width further right", "of the width further left", _MOVED, is_relative=False
    ),
    "position_y": _Statistic(
        _POSITION, _CONTENT, "of the height further down", "of the height further up", _MOVED, is_relative=False
    ),
}


def distinct_rows(statistics: Mapping[str, FloatArray]) -> tuple[npt.NDArray[np.intp], int]:
    """Return the index of one image of each picture, ascending, and how many images show the commonest picture.

    All statistics are equal to the last bit for two copies of one picture, and never for two pictures.
    """
    rows = np.stack([statistics[name] for name in COMPARED], axis=1)
    if not len(rows):
        return np.empty(0, np.intp), 0
    _, first, counts = np.unique(rows, axis=0, return_index=True, return_counts=True)
    return np.sort(first), int(counts.max())


def repeated_picture(images: int, sampled: int, commonest: int) -> Iterator[Change]:
    """Report a picture that many of a night's images show.

    Args:
        images: number of images of the night.
        sampled: number of those whose statistics are known.
        commonest: how many of them show the commonest picture.
    """
    share = commonest / max(sampled, 1)
    level = _REPEATED.level(share)
    if commonest >= _MIN_REPEATED and level != "fine":
        count = "all" if commonest == sampled else f"{round(share * images):,} of"
        text = f"{count} {images:,} images are the same picture: does the camera deliver new ones?"
        yield Change("repeated", level, p_value=0.0, size=share / _REPEATED.act, text=text)


def compare_statistics(night: Mapping[str, FloatArray], good: Mapping[str, FloatArray]) -> Iterator[Change]:
    """Compare a night's images with good images, a statistic at a time; each p-value is that of one test.

    Args:
        night: one value for each distinct image, at least one.
        good: one value for each good image, at least one.
    """
    for name, statistic in _STATISTICS.items():
        samples = night[name], good[name]
        yield from list(_whole_night(name, statistic, *samples)) or _part_of_night(name, statistic, *samples)


def _whole_night(name: str, statistic: _Statistic, night: FloatArray, good: FloatArray) -> Iterator[Change]:
    """Report that the night's median moved."""
    middle, usual = float(np.median(night)), float(np.median(good))
    change = statistic.change(middle, usual)
    level = statistic.limits.level(abs(change))
    if level != "fine":
        deviation = max(_deviation(good), 1e-9)
        level = min(level, _DEVIATIONS.level(abs(middle - usual) / deviation), key=LEVELS.index)
    if level != "fine":
        p_value = compare_samples(night, good).p_value
        text = f"{statistic.describe(change)} than in training: {statistic.cause}"
        yield Change(name, level, p_value=p_value, size=abs(change) / statistic.limits.act, text=text)


def _part_of_night(name: str, statistic: _Statistic, night: FloatArray, good: FloatArray) -> Iterator[Change]:
    """Report images, too few to move the night's median, that lie far beyond all good ones on one side."""
    for beyond in (night[night > good.max()], night[night < good.min()]):
        share = len(beyond) / len(night)
        level = _PART_OF_NIGHT.level(share)
        if level == "fine":
            continue
        change = statistic.change(float(np.median(beyond)), float(np.median(good)))
        if abs(change) >= statistic.limits.act:
            p_value = exceedances(len(beyond), len(night), len(good))
            text = (
                f"{percent(share)} of the images are unlike every training image: {statistic.describe(change)}; "
                f"{statistic.cause}"
            )
            yield Change(name, level, p_value=p_value, size=share / _PART_OF_NIGHT.act, text=text)


def _deviation(values: FloatArray) -> float:
    """Estimate the standard deviation of a normal distribution by the median absolute deviation."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))
