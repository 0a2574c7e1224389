"""What is known of a model besides its weights. It travels between processes that compute nothing: no torch here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from stpm import __version__
from stpm.errors import ConfigError, ModelError
from stpm.method.calibration import HeatmapScale, PartScale
from stpm.method.preprocessing import Preprocessing
from stpm.method.recipe import Precision, Recipe
from stpm.options import Integers, Size

FORMAT = 3
STUDENT = "student.safetensors"
MEMORY = "memory.safetensors"
CALIBRATION = "calibration.parquet"


@dataclass(frozen=True)
class FitSummary:
    """What fitting did: wall seconds (decoding included), losses in [0, 2] of the epoch that was kept.

    Without a student there are no epochs, and the losses are None.
    """

    seconds: float
    epochs: int
    kept_epoch: int
    train_loss: float | None
    validation_loss: float | None
    train_count: int
    validation_count: int
    calibration_count: int
    device: str

    @property
    def good_count(self) -> int:
        """All good images."""
        return self.train_count + self.validation_count


@dataclass(frozen=True)
class ModelRecord:
    """model.json: all that scoring needs to know besides the weights. Digests are SHA-256.

    `recipe` is what was asked for, where the size may be `auto`; `preprocessing` is what came of it for this category.
    """

    category: str
    recipe: Recipe
    preprocessing: Preprocessing
    precision: Precision
    teacher_digest: str
    heatmap_scale: HeatmapScale
    part_scales: tuple[PartScale, ...]
    fit: FitSummary
    files: dict[str, str]
    versions: dict[str, str]
    created: str
    format: int = FORMAT

    @classmethod
    def from_json(cls, data: bytes, uri: str) -> ModelRecord:
        """The record that these bytes hold.

        Raises:
            ModelError: if they are no JSON, of another format, or a field is missing, unknown or of another type.
        """
        try:
            values = json.loads(data)
        except ValueError as error:
            raise ModelError(f"{uri}: cannot be read: {error}") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise ModelError(f"{uri}: format {found!r}, this version reads {FORMAT}; fit the model again")
        try:
            record: ModelRecord = _typed(cls, values, "")
        except (ValueError, ConfigError) as error:
            raise ModelError(f"{uri}: not a record of this version: {error}; fit the model again") from error
        return record

    @cached_property
    def model_id(self) -> str:
        """The category, and a digest of all that scores, p-values, verdicts and heatmaps depend on."""
        files = [self.files.get(name) for name in (STUDENT, MEMORY, CALIBRATION)]
        values = (self.recipe, self.preprocessing, self.precision, self.teacher_digest, self.part_scales, files)
        digest = hashlib.sha256(repr((values, self.heatmap_scale)).encode()).hexdigest()
        return f"{self.category}-{digest[:12]}"


def library_versions() -> dict[str, str]:
    """Of what a model or a run was made with."""
    names = ("torch", "timm", "ray", "numpy", "pillow")
    return {"stpm": __version__, "python": platform.python_version()} | {name: version(name) for name in names}


def _typed(kind: Any, value: Any, name: str) -> Any:  # noqa: PLR0911
    """What JSON gave for a field, as an instance of the field's type. Raises ValueError naming the field."""
    if kind is Size and isinstance(value, str):
        return Size(value)
    if kind is Integers and isinstance(value, list):
        return Integers(_typed(int, item, name) for item in value)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        if differ := value.keys() ^ hints.keys():
            raise ValueError(f"{name or 'the record'} has fields too many or too few: {', '.join(sorted(differ))}")
        prefix = f"{name}." if name else ""
        return kind(**{field: _typed(hints[field], item, prefix + field) for field, item in value.items()})
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            return tuple(_typed(*pair, name) for pair in zip(kinds, value, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {key: _typed(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    elif origin is UnionType:
        return None if value is None else _typed(next(k for k in arguments if k is not NoneType), value, name)
    elif (origin is Literal and value in arguments) or kind is type(value):
        return value
    elif kind is float and type(value) is int:
        return float(value)
    raise ValueError(f"{name} is {value!r}, which is no {getattr(kind, '__name__', kind)}")
