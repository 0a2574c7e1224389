"""Options of the job that lists and exchanges models. They import nothing heavy: the command line reads them first."""

from __future__ import annotations

from dataclasses import dataclass

from stpm.errors import ConfigError
from stpm.method.calibration import check_false_alarm_rate
from stpm.options import WAIT_HELP, Names, check_options, option


@dataclass(frozen=True)
class ModelsOptions:
    """A model store, and what to change in it.

    Raises:
        ConfigError: if a required option is missing, a value is out of range, or two options exclude each other.
    """

    models: str = option("", "model store: a folder or a URI", required=True)
    categories: Names = option(Names(), "categories to list or change, separated by commas; none: all of the store")
    roll_back: bool = option(False, "make each category's previous model the current one; twice goes back two models")
    roll_forward: bool = option(
        False, "make the model after each category's current one the current one: one that was rolled back or staged"
    )
    keep: int = option(
        0,
        "remove the models of each category, except the current one, this many before it, and those after it; "
        "0: remove none",
        minimum=0,
    )
    false_alarm_rate: float = option(0.01, "rate whose thresholds are listed, 0 to 1")
    wait: bool = option(False, WAIT_HELP)

    def __post_init__(self) -> None:
        check_options(self)
        check_false_alarm_rate(self.false_alarm_rate)
        if self.roll_back and self.roll_forward:
            raise ConfigError("--roll-back and --roll-forward are both given; give one")
