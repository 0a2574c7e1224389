"""One thing that changed from one night to another, or since a model was fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

# The verdict on a category's night, from what is to act on to what needs nobody.
Level = Literal["act", "watch", "not judged", "cannot tell", "fine"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Change:
    """One thing that changed, or that chance would hide if it had: then the level is `cannot tell`.

    Args:
        name: a statistic's name, or `images`, `repeated`, `errors`, `alarms`, `scores` or `model`.
        level: by its size.
        p_value: probability that chance makes as large a change, in any of the tests that are made together; 0 for a
            plain fact.
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

    def change(self, name: str, size: float, p_value: float, text: str, highest: Level = "act") -> Change:
        """Return a change of this size, whose level is `highest` if the limits say more."""
        return Change(name, max(self.level(size), highest, key=LEVELS.index), p_value, size / self.act, text)


def percent(fraction: float) -> str:
    """Write a fraction with two significant digits or more.

    >>> percent(0.0317), percent(0.314)
    ('3.2 %', '31 %')
    """
    value = 100 * fraction
    return f"{value:.1f} %" if abs(value) < 9.95 else f"{value:.0f} %"
