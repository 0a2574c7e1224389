"""Options of the job `models`. They import nothing heavy: the command line reads them first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from stpm.errors import ConfigError
from stpm.options import WAIT_HELP, Names, Options, flag, option

# No category can have this name.
_ALL = "*"
_MAX_REASON = 1000


class Costs(NamedTuple):
    """What a false alarm and a missed defect cost, in one unit, and the fraction of images that have a defect."""

    false_alarm: float
    miss: float
    defect_rate: float

    def of_thousand_images(self, false_alarm_rate: float, recall: float) -> float:
        """Return the cost to expect of 1,000 images."""
        false_alarms, misses = (1 - self.defect_rate) * false_alarm_rate, self.defect_rate * (1 - recall)
        return 1000 * (false_alarms * self.false_alarm + misses * self.miss)

    def __str__(self) -> str:
        rate = f"{self.defect_rate:g} of the images have a defect"
        return f"A false alarm costs {self.false_alarm:g}, a missed defect {self.miss:g}, and {rate}."


@dataclass(frozen=True)
class ModelsOptions(Options):
    """A model store, and what to change in it."""

    models: str = option("", "model store: a folder or a URI", required=True)
    categories: Names = option(
        Names(),
        "categories to list or change, separated by commas; '*' or none: all of the store; --roll-back and "
        "--roll-forward need them or '*'",
    )
    roll_back: bool = option(False, "make each category's previous model the current one; twice goes back two models")
    roll_forward: bool = option(
        False, "make the model after each category's current one, which was rolled back, the current one again"
    )
    threshold: Names = option(
        Names(),
        "thresholds that a person decides, such as bottle=0.8,pill=1.2: a score above it makes an image anomalous at "
        "any --false-alarm-rate. Each is a new version of the category's model; bottle=auto takes it back",
    )
    by: str = option("", "who decides the --threshold; none: the login name")
    because: str = option("", "why, kept with the decision")
    keep: int = option(
        0,
        "remove the models of each category, except the current one, this many before it, and those after it; "
        "0: remove none",
        minimum=0,
    )
    false_alarm_rate: float = option(0.01, "rate whose thresholds are listed, 0 to 1", above=0, below=1)
    thresholds: bool = option(False, "list the false alarms to expect at other thresholds")
    page: str = option("", "HTML file for them and a picture: a path or a URI")
    labelled: str = option(
        "", "run folder for the recall at them: all of its images have a label, or a random part, not its alarms alone"
    )
    cost_of_false_alarm: float = option(0.0, "in any unit; with the next two, the least cost is marked", minimum=0)
    cost_of_miss: float = option(0.0, "of a defect that is not found, in the same unit", minimum=0)
    defect_rate: float = option(0.0, "fraction of images, 0 to 1, that have a defect", minimum=0, below=1)
    wait: bool = option(False, WAIT_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        changes = [flag(name) for name in ("threshold", "roll_back", "roll_forward") if getattr(self, name)]
        if len(changes) > 1:
            raise ConfigError(f"{changes[0]} and {changes[1]} are both given; give one")
        if self.categories and self.threshold:
            raise ConfigError("--threshold and --categories are both given; --threshold alone names the categories")
        if (self.roll_back or self.roll_forward) and not self.categories:
            raise ConfigError(
                f"{changes[0]} is given without --categories; name them, or give --categories '*' for all"
            )
        if (self.by or self.because) and not self.threshold:
            raise ConfigError("--by and --because say who decides a --threshold, which is missing")
        if len(self.because) > _MAX_REASON:
            raise ConfigError(f"--because has {len(self.because):,} characters; give at most {_MAX_REASON:,}")
        if len(self.decisions) < len(self.threshold):
            raise ConfigError(f"--threshold is {','.join(self.threshold)}; give each category once")
        costs = (self.cost_of_false_alarm, self.cost_of_miss, self.defect_rate, self.labelled)
        if any(costs[:3]) and not all(costs):
            names = ("cost_of_false_alarm", "cost_of_miss", "defect_rate", "labelled")
            raise ConfigError(f"the least cost needs all of {', '.join(map(flag, names))}; give all of them, or none")

    @property
    def decisions(self) -> dict[str, float | None]:
        """The thresholds of --threshold by category; None takes a decision back."""
        return dict(map(_parse_threshold, self.threshold))

    @property
    def wanted(self) -> list[str]:
        """The categories to list or change, each once; empty: all of the store."""
        return [] if _ALL in self.categories else list(dict.fromkeys([*self.categories, *self.decisions]))

    @property
    def costs(self) -> Costs | None:
        """The costs of errors; None: they are not known."""
        return Costs(self.cost_of_false_alarm, self.cost_of_miss, self.defect_rate) if self.defect_rate else None


def _parse_threshold(text: str) -> tuple[str, float | None]:
    category, _, number = text.rpartition("=")
    try:
        value = None if number == "auto" else float(number)
    except ValueError:
        value = math.nan
    if not category or (value is not None and not math.isfinite(value)):
        raise ConfigError(f"--threshold is {text!r}; give CATEGORY=NUMBER, or CATEGORY=auto to take a decision back")
    return category, value
