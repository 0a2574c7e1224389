"""Options of the job `models`. They import nothing heavy: the command line reads them first."""

from __future__ import annotations

from dataclasses import dataclass

from stpm.errors import ConfigError
from stpm.options import WAIT_HELP, Names, Options, option

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
    keep: int = option(
        0,
        "remove the models of each category, except the current one, this many before it, and those after it; "
        "0: remove none",
        minimum=0,
    )
    false_alarm_rate: float = option(0.01, "rate whose thresholds are listed, 0 to 1", above=0, below=1)
    wait: bool = option(False, WAIT_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.roll_back and self.roll_forward:
            raise ConfigError("--roll-back and --roll-forward are both given; give one")
        if (self.roll_back or self.roll_forward) and not self.categories:
            name = "--roll-back" if self.roll_back else "--roll-forward"
            raise ConfigError(f"{name} is given without --categories; name them, or give --categories '*' for all")

    @property
    def names_categories(self) -> bool:
        """Whether the categories are those named, and not all of the store."""
        return bool(self.categories) and _ALL not in self.categories
