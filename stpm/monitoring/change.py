"""One thing that changed from one night to another, or since a model was fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Level = Literal["fine", "watch", "act"]
LEVELS: tuple[Level, ...] = ("fine", "watch", "act")


@dataclass(frozen=True)
class Change:
    """One thing that changed.

    Args:
        name: a statistic's name, or `images`, `repeated`, `errors`, `alarms`, `scores` or `model`.
        level: by its size.
        p_value: probability that chance makes as large a change; 0 for a plain fact.
        size: how large it is, 1 where it begins to call for action.
        text: for people, in plain words with numbers.
    """

    name: str
    level: Level
    p_value: float
    size: float
    text: str


class Limits(NamedTuple):
    """The smallest sizes of a change to watch, and of one that calls for action."""

    watch: float
    act: float

    def level(self, size: float) -> Level:
        """Return the level of a change of this size."""
        return "act" if size >= self.act else "watch" if size >= self.watch else "fine"


def percent(share: float) -> str:
    """Write a share with at least two significant digits.

    >>> percent(0.0317), percent(0.314)
    ('3.2 %', '31 %')
    """
    value = 100 * share
    return f"{value:.1f} %" if abs(value) < 9.95 else f"{value:.0f} %"
