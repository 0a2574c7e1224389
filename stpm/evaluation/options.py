"""Options of evaluation and of the benchmark. They import nothing heavy: the command line reads them first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stpm.errors import ConfigError
from stpm.fitting.options import CategoryOptions
from stpm.options import (
    CATEGORIES_HELP,
    EXCLUDE_HELP,
    ROI_HELP,
    TRACK_HELP,
    WAIT_HELP,
    Export,
    Integers,
    Names,
    Options,
    check_export,
    option,
)

MasksAt = Literal["model", "original"]


@dataclass(frozen=True)
class EvaluateOptions(Options):
    """The run to evaluate, and where the report goes."""

    run: str = option(
        "",
        "run folder of the benchmark, or of a score job whose table has a column `label` (for pixel metrics also "
        "`mask`, and --raw-maps): a folder or a URI",
        required=True,
    )
    models: str = option("", "model store of that run, or models/ of the benchmark, if it has moved since")
    out: str = option("", "folder for the report: a folder or a URI; none: the run folder")


@dataclass(frozen=True)
class CompareOptions(Options):
    """The two runs to compare, and the page."""

    run: Names = option(
        Names(),
        "run folders of A and of B, each by its own --run or separated by a comma: A is what is in use, B what may "
        "replace it. Both have scored the same images, with labels or without",
        required=True,
    )
    models: Names = option(Names(), "model stores of A and of B, or one of both, if they have moved since")
    page: str = option("compare.html", "HTML file: a path or a URI")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.run) != 2 or len(self.models) > 2:
            raise ConfigError(
                f"--run names {len(self.run)} runs, and --models {len(self.models)} stores; give two runs"
            )


@dataclass(frozen=True)
class BenchmarkOptions(Options):
    """The data set to benchmark, and the run folder."""

    data: str = option(
        "",
        "data set in the MVTec AD layout: a folder or a URI; none: the demo set, which is generated, with its own "
        "defaults for teacher and size",
    )
    out: str = option("runs/benchmark", "run folder for models/, scores/, heatmaps/ and the report: a folder or a URI")
    categories: Names = option(
        Names(), f"categories to benchmark, separated by commas; none: all of the data set{CATEGORIES_HELP}"
    )
    exclude: str = option("", EXCLUDE_HELP)
    roi: str = option("", ROI_HELP)
    seeds: Integers = option(Integers((0,)), "seeds to fit and score each category with, separated by commas")
    wait: bool = option(False, WAIT_HELP)
    by_category: tuple[CategoryOptions, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"--seeds is {','.join(map(str, self.seeds))!r}; give each seed once, such as 0,1,2")
        if not self.out:
            raise ConfigError("--out is empty; give a folder or a URI")


@dataclass(frozen=True)
class ReportOptions(Options):
    """How a report measures, and the values that it must reach."""

    masks_at: MasksAt = option(
        "model",
        "where pixels are compared; `model`: masks brought to model size, as the paper's authors do; `original`: maps "
        "brought to the image's size",
    )
    require: Names = option(
        Names(),
        "values that must be reached, separated by commas or each with its own --require: mean.image_auroc=0.95; "
        "image_false_alarm_rate must be at most its value. Exit code 2 if one is not reached",
    )
    baseline: str = option("", "report.json of an earlier run, whose values must be reached")
    tolerance: float = option(0.01, "largest shortfall from a baseline's value: 0.01 accepts 0.94 for 0.95", minimum=0)
    track: str = option("", TRACK_HELP)
    export: Export = option("none", "also write the tables, and the rows of all images, as CSV or in one XLSX file")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_export(self.export)
