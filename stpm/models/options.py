"""Options of the job `models`. They import nothing heavy: the command line reads them first."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stpm.errors import ConfigError
from stpm.options import WAIT_HELP, Names, Options, flag, option

# No category can have this name.
_ALL = "*"


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
    labelled: str = option(
        "", "run folder for the recall at them: all of its images have a label, or a random part, not its alarms alone"
    )
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
        if len(self.decisions) < len(self.threshold):
            raise ConfigError(f"--threshold is {','.join(self.threshold)}; give each category once")

    @property
    def decisions(self) -> dict[str, float | None]:
        """The thresholds of --threshold by category; None takes a decision back."""
        return dict(map(_parse_threshold, self.threshold))

    @property
    def wanted(self) -> list[str]:
        """The categories to list or change, each once; empty: all of the store."""
        return [] if _ALL in self.categories else list(dict.fromkeys([*self.categories, *self.decisions]))


def _parse_threshold(text: str) -> tuple[str, float | None]:
    category, _, number = text.rpartition("=")
    try:
        value = None if number == "auto" else float(number)
    except ValueError:
        value = math.nan
    if not category or (value is not None and not math.isfinite(value)):
        raise ConfigError(f"--threshold is {text!r}; give CATEGORY=NUMBER, or CATEGORY=auto to take a decision back")
    return category, value
