"""What is known of a model besides its weights. It travels between processes that compute nothing: no torch here."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version

from stpm import __version__
from stpm.calibration import HeatmapScale, PartScale
from stpm.preprocessing import Preprocessing
from stpm.recipe import Precision, Recipe

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
