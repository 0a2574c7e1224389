"""Judge a night of one category against the good images of its model, and against earlier nights."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Level = Literal["fine", "watch", "act"]
FloatArray = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Reference:
    """The good images of a category, from its model.

    Args:
        calibration_count: number of calibration images.
        statistics: by name, one value for each good image: `stpm.data.image_statistics.NAMES`, `width` and `height`.
    """

    calibration_count: int
    statistics: Mapping[str, FloatArray]


@dataclass(frozen=True)
class CategoryNight:
    """One category's rows of one night. `scored` images are those without an error.

    Args:
        date: of the night.
        category: its name.
        model_id: of the model that scored the images, "" if none did.
        images: number of rows, errors included.
        errors: number of rows with an error.
        alarms: number of anomalous images.
        false_alarm_rate: that the run requested.
        p_values: of scored images, or of a random sample of them.
        statistics: of the same images in the same order, by name as in `Reference`.
    """

    date: datetime.date
    category: str
    model_id: str
    images: int
    errors: int
    alarms: int
    false_alarm_rate: float
    p_values: FloatArray
    statistics: Mapping[str, FloatArray]

    @property
    def scored(self) -> int:
        """Count the images without an error."""
        return self.images - self.errors


@dataclass(frozen=True)
class Change:
    """One thing that changed.

    Args:
        name: a statistic's name, or `images`, `repeated`, `errors`, `alarms`, `scores`, `size`.
        level: watch or act.
        p_value: probability of a change as large by chance in any of the tests judged together; 0 for a plain fact.
        text: for people, in plain words with numbers.
    """

    name: str
    level: Level
    p_value: float
    text: str


@dataclass(frozen=True)
class Verdict:
    """The verdict on a night; the change that matters most comes first."""

    level: Level
    changes: tuple[Change, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Return what changed, for people."""
        return tuple(change.text for change in self.changes)


def judge(nights: Sequence[CategoryNight], reference: Reference, *, tests: int, false_verdict_rate: float) -> Verdict:
    """Judge the last of a category's nights.

    Args:
        nights: of one category, oldest first, one or more; the last one is judged.
        reference: of the model that scored the last night.
        tests: number of verdicts that are given together (categories × nights): the rate holds for all of them.
        false_verdict_rate: probability, in (0, 1), that any of those verdicts is not `fine` though nothing changed.
    """
    raise NotImplementedError


def rate_interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Clopper–Pearson interval of a rate; (0, 1) if the total is 0."""
    raise NotImplementedError
