"""What is known of a model besides its weights. It travels between processes that compute nothing: no torch here."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version

from stpm import __version__
from stpm.calibration import HeatmapScale
from stpm.preprocessing import Preprocessing
from stpm.recipe import Precision, Recipe

FORMAT = 2
STUDENT = "student.safetensors"


@dataclass(frozen=True)
class FitSummary:
    """What fitting did: wall seconds (decoding included), losses in [0, 2] of the epoch that was kept."""

    seconds: float
    epochs: int
    kept_epoch: int
    train_loss: float
    validation_loss: float
    train_count: int
    validation_count: int
    calibration_count: int
    device: str


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
    data_fingerprint: str
    heatmap_scale: HeatmapScale
    fit: FitSummary
    files: dict[str, str]
    versions: dict[str, str]
    created: str
    format: int = FORMAT

    @property
    def model_id(self) -> str:
        return f"{self.category}-{self.files[STUDENT][:12]}"


def library_versions() -> dict[str, str]:
    """Of what a model or a run was made with."""
    names = ("torch", "timm", "ray", "numpy", "pillow")
    return {"stpm": __version__, "python": platform.python_version()} | {name: version(name) for name in names}
