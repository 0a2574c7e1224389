"""Nights made of random numbers."""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stpm.data.image_statistics import COMPARED
from stpm.line.night import CategoryNight
from stpm.line.verdict import Reference, Sample
from stpm.method.calibration import threshold_rank

RATE = 0.01
# Mean and standard deviation of each statistic of good images.
USUAL = {
    "width": (640, 0),
    "height": (480, 0),
    "brightness": (110, 3),
    "contrast": (0.6, 0.02),
    "sharpness": (0.15, 0.01),
    "red_to_green": (1.0, 0.01),
    "blue_to_green": (0.9, 0.01),
    "position_x": (0.5, 0.01),
    "position_y": (0.45, 0.02),
}


def draw_statistics(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    return {name: rng.normal(*USUAL[name], count).astype(np.float32) for name in COMPARED}


@dataclass(frozen=True, kw_only=True)
class DrawnNight(CategoryNight):
    """A night of a category: its date, counts and sample."""

    date: datetime.date
    p_values: np.ndarray
    statistics: Mapping[str, np.ndarray]

    @property
    def sample(self) -> Sample:
        return Sample(self.p_values, self.statistics)


class Line:
    """A production line: a model with one calibration, and nights that it scored."""

    def __init__(self, rng: np.random.Generator, calibration: int = 50, good: int = 100) -> None:
        self.rng = rng
        self.calibration = np.sort(rng.random(calibration))
        self.reference = Reference(calibration, draw_statistics(rng, good))

    def night(self, number: int = 0, images: int = 300, defects: float = 0.0, **changed: Any) -> DrawnNight:
        """Make a night of good images, and a share of defects above all of the calibration's."""
        scores = self.rng.random(images)
        scores[self.rng.random(images) < defects] = 2.0
        count = len(self.calibration)
        p_values = (1 + count - np.searchsorted(self.calibration, scores)) / (count + 1)
        values: dict[str, Any] = {
            "date": datetime.date(2026, 11, 1) + datetime.timedelta(number),
            "model_id": "nut-1",
            "images": images,
            "errors": {},
            "alarms": int((scores > self.calibration[-threshold_rank(count, RATE)]).sum()),
            "false_alarm_rate": RATE,
            "p_values": p_values.astype(np.float32),
            "statistics": draw_statistics(self.rng, images),
        }
        return DrawnNight(**(values | changed))

    def nights(self, number: int, **options: Any) -> list[DrawnNight]:
        return [self.night(i, **options) for i in range(number)]

    def empty(self, number: int) -> DrawnNight:
        nothing: Mapping[str, np.ndarray] = dict.fromkeys(COMPARED, np.empty(0, np.float32))
        return self.night(number, images=0, statistics=nothing)
