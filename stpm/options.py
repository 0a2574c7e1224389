"""How options are declared, the types of their values, and the cluster's options."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from operator import index
from typing import Literal, TypeVar

from stpm.errors import ConfigError
from stpm.names import check_no_secret

T = TypeVar("T")

_SIZE = re.compile(r"(\d+)(?:x(\d+))?")
_AUTO = "auto"
_HOLDS = {"at least": operator.ge, "more than": operator.gt, "at most": operator.le, "less than": operator.lt}

EXCLUDE_HELP = (
    "text file (a path or URI) of good images to leave out, such as a model's fit.html saves: in each line a URI, or a "
    "file name that one of them has"
)
ROI_HELP = (
    "what to inspect of all images instead of <category>/roi.png: a mask of their size (a path or URI), white where "
    "they are inspected and black elsewhere; or polygons in their pixels, as in '10,10 200,10 200,180; 300,300 …'"
)
CATEGORIES_HELP = "; a --config file may also say which have options of their own (docs/recipes.md)"
TRACK_HELP = (
    "MLflow tracking URI, of a server (http://mlflow:5000) or a folder, to log recipes, losses, metrics and pages to "
    "(pip install 'stpm[mlflow]'); the experiment is MLFLOW_EXPERIMENT_NAME, or the last folder of the data set or run"
)
WAIT_HELP = "wait while another run holds the folder that this one writes to, instead of refusing"


class Integers(tuple[int, ...]):
    """Integers, written `0,1,2` on the command line and as a list in YAML.

    >>> Integers("0, 1"), Integers([2])
    ((0, 1), (2,))
    """

    __slots__ = ()

    def __new__(cls, items: str | Iterable[int | str] = ()) -> Integers:
        return super().__new__(cls, (int(item) if isinstance(item, str) else index(item) for item in _split(items)))


class Names(tuple[str, ...]):
    """Names, written `a,b` on the command line and as a list in YAML."""

    __slots__ = ()

    def __new__(cls, items: str | Iterable[str] = ()) -> Names:
        return super().__new__(cls, map(str, _split(items)))


def _split(items: str | Iterable[T]) -> Iterable[T | str]:
    return [item.strip() for item in items.split(",") if item.strip()] if isinstance(items, str) else items


class Size(str):
    """Height and width in pixels, written `640x256`, or `256` for a square; or `auto`, to be chosen later.

    Raises:
        ValueError: if the text has another form.
    """

    __slots__ = ()

    def __new__(cls, size: str | int | Sequence[int]) -> Size:
        text = size if isinstance(size, str) else "x".join(map(str, [size] if isinstance(size, int) else size))
        if text == _AUTO:
            return super().__new__(cls, text)
        match = _SIZE.fullmatch(text)
        if not match:
            raise ValueError(f"{text!r} is not a size; give HEIGHTxWIDTH, one number for a square, or auto")
        height, width = int(match[1]), int(match[2] or match[1])
        return super().__new__(cls, f"{height}x{width}")

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width; None for `auto`."""
        if self == _AUTO:
            return None
        height, width = self.split("x")
        return int(height), int(width)


def option(
    default: T,
    text: str,
    *,
    required: bool = False,
    is_secret: bool = False,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> T:
    """Declare a field of `Options`, with its help text, which names the unit, and limits of a number.

    A required option is one that the user has to give; --print-config leaves out one that may hold a secret.
    """
    limits = {"at least": minimum, "more than": above, "at most": maximum, "less than": below}
    metadata = {"help": text, "required": required, "is_secret": is_secret}
    metadata["limits"] = {words: limit for words, limit in limits.items() if limit is not None}
    field: T = dataclasses.field(default=default, metadata=metadata)
    return field


def flag(name: str) -> str:
    """Return the command line's name of a field.

    >>> flag("false_alarm_rate")
    '--false-alarm-rate'
    """
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Options:
    """Base class of the option dataclasses, which are checked when they are made.

    In Python, `Integers` and `Names` may be given as any sequence, and a `Size` as 256 or (640, 256).

    Raises:
        ConfigError: if a required option is empty, a number is infinite or beyond a limit, or a URI holds a secret.
    """

    def __post_init__(self) -> None:
        fields = [field for field in dataclasses.fields(self) if field.metadata]
        required = [field.name for field in fields if field.metadata["required"]]
        if missing := [flag(name) for name in required if not getattr(self, name)]:
            raise ConfigError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; see --help")
        for field in fields:
            kind, value, limits = type(field.default), getattr(self, field.name), field.metadata["limits"]
            if issubclass(kind, Integers | Names | Size) and not isinstance(value, kind):
                try:
                    value = kind(value)
                except (TypeError, ValueError) as error:
                    raise ConfigError(f"{flag(field.name)} is {value!r}: {error}") from error
                object.__setattr__(self, field.name, value)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{flag(field.name)} is {value}; give a finite number")
            if value is not None and not all(_HOLDS[words](value, limit) for words, limit in limits.items()):
                valid = " and ".join(f"{words} {limit}" for words, limit in limits.items())
                raise ConfigError(f"{flag(field.name)} is {value}; give {valid}")
            if not field.metadata["is_secret"]:
                for text in value if isinstance(value, tuple) else (value,):
                    check_no_secret(str(text))


Export = Literal["none", "csv", "xlsx"]


def check_export(kind: Export) -> None:
    """Raise ConfigError, before any work is done, if what writes such tables is not installed."""
    if kind == "xlsx" and not find_spec("xlsxwriter"):
        raise ConfigError("--export xlsx needs XlsxWriter: pip install 'stpm[xlsx]', or give --export csv")


Heatmaps = Literal["all", "anomalous", "none"]
WantedBackend = Literal["auto", "pytorch", "openvino"]
Backend = Literal["pytorch", "openvino"]


@dataclass(frozen=True)
class ClusterOptions(Options):
    """How a job runs: what computes, and how it uses a cluster of several machines."""

    mounted: Names = option(
        Names(),
        "folders that every node of the cluster mounts at the same place, separated by commas: only under them may "
        "local paths be used on several machines",
    )
    first_node: Literal["any", "gpu", "cpu"] = option(
        "any",
        "the kind of node to wait for, where a cluster starts its nodes on demand; any: use the nodes that are there, "
        "and ask for one with a GPU if there are none",
    )
    node_minutes: float = option(15.0, "minutes to wait for that node", minimum=0)
    backend: WantedBackend = option(
        "auto",
        "what computes features on a CPU: pytorch, or openvino, which is faster there (pip install 'stpm[openvino]'); "
        "auto: openvino where every node has it. On a GPU PyTorch computes them",
    )
    plan: bool = option(False, "print what would run on each node of the cluster, and start nothing")
