"""Options of the benchmark job. They import nothing heavy: the command line reads them first."""

from __future__ import annotations

from dataclasses import dataclass

from stpm.errors import ConfigError
from stpm.options import WAIT_HELP, Integers, Names, Options, option


@dataclass(frozen=True)
class BenchmarkOptions(Options):
    """The data set to benchmark, and the run folder.

    Raises:
        ConfigError: if no seed is given, or one twice, or no run folder, or a URI holds a password.
    """

    data: str = option(
        "",
        "data set in the MVTec AD layout: a folder or a URI; none: the demo set, which is generated, with its own "
        "defaults for teacher and size",
    )
    out: str = option("runs/benchmark", "run folder for models/, scores/, heatmaps/ and the report: a folder or a URI")
    categories: Names = option(Names(), "categories to benchmark, separated by commas; none: all of the data set")
    seeds: Integers = option(Integers((0,)), "seeds to fit and score each category with, separated by commas")
    wait: bool = option(False, WAIT_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"--seeds is {','.join(map(str, self.seeds))!r}; give each seed once, such as 0,1,2")
        if not self.out:
            raise ConfigError("--out is empty; give a folder or a URI")
