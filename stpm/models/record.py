"""The record of a model: everything but its weights. Processes without torch read it, so this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from stpm import storage
from stpm.errors import ConfigError
from stpm.method.calibration import threshold
from stpm.method.preprocessing import Preprocessing
from stpm.method.recipe import Precision, Recipe
from stpm.method.scales import DistanceScale, HeatmapScale
from stpm.models.libraries import installed_versions
from stpm.names import is_utf8
from stpm.options import Backend
from stpm.times import timestamp

STUDENT = "student.safetensors"
MEMORY = "memory.safetensors"
CALIBRATION = "calibration.parquet"
IMAGE_STATISTICS = "image_statistics.parquet"
# Scores are float32.
_LARGEST = 3e38


@dataclass(frozen=True)
class FitRecord:
    """The outcome of one fit; counts are of images.

    Args:
        seconds: wall time, decoding included.
        epochs: 0 without a student.
        kept_epoch: number of the epoch whose weights were kept, from 1; 0 without a student.
        train_loss: mean loss of the training images in the kept epoch, in [0, 2]; None without a student.
        validation_loss: the same of the held-out images.
        device: name of the GPU, or `cpu` and the backend, that fitted the model.
    """

    seconds: float
    epochs: int
    kept_epoch: int
    train_loss: float | None
    validation_loss: float | None
    train_count: int
    held_out_count: int
    calibration_count: int
    device: str

    @property
    def backend(self) -> Backend:
        """Return what computed the features."""
        return "openvino" if self.device == "cpu, openvino" else "pytorch"

    @property
    def good_count(self) -> int:
        """Count all good images."""
        return self.train_count + self.held_out_count


@dataclass(frozen=True)
class AddedImage:
    """An image that a person marked as good: the SHA-256 of its file, and where the file was when it was added."""

    digest: str
    uri: str


@dataclass(frozen=True)
class Decision:
    """A threshold that a person set: an image whose score is above it is called anomalous, at any false-alarm rate.

    Args:
        threshold: a finite number, which may be negative.
        by: who set it.
        because: why; "" if that was not said.
        at: when, ISO 8601, UTC.

    Raises:
        ConfigError: if the threshold is no such number, nobody set it, or a text is not UTF-8.
    """

    threshold: float
    by: str
    because: str = ""
    at: str = field(default_factory=timestamp)

    def __post_init__(self) -> None:
        if not abs(self.threshold) < _LARGEST:
            raise ConfigError(f"the threshold is {self.threshold}; give a finite number")
        if not self.by or not is_utf8(self.by + self.because):
            raise ConfigError("a threshold is set by somebody, whose name and reason are UTF-8; give --by")

    def __str__(self) -> str:
        return f"{self.threshold:.9g}, decided by {self.by} on {self.at}{self.because and f' because: {self.because}'}"


@dataclass(frozen=True)
class StoredFile:
    """A file of a model: its SHA-256, and its size in bytes."""

    digest: str
    size: int


@dataclass(frozen=True)
class ModelRecord:
    """The contents of model.json: everything that scoring needs besides the weights. Digests are SHA-256.

    Args:
        recipe: the user's recipe, with this model's seed and the epochs that `min_steps` asks for; its size may be
            `auto`.
        preprocessing: how an image becomes an input, at the size that was chosen for the category.
        precision: number format of convolutions.
        teacher_licence: of the teacher's weights, as timm names it; "" where it is not known.
        heatmap_scale: values of the anomaly map that become grey levels 0 and 128 of heatmaps.
        distance_scales: scale of each distance map, in the order of `Distances.maps`; empty unless the recipe fuses
            by quantiles.
        added_images: all images that were marked as good and calibrate the model.
        decision: what a person decided; None: the false-alarm rate of a run sets the threshold.
        files: all but model.json, by name.
        library_versions: of Python and of the libraries that made the model, by name.
        created: when the record was made, ISO 8601, UTC.
    """

    category: str
    recipe: Recipe
    preprocessing: Preprocessing
    precision: Precision
    teacher_digest: str
    teacher_licence: str
    heatmap_scale: HeatmapScale
    distance_scales: tuple[DistanceScale, ...]
    fit: FitRecord
    added_images: tuple[AddedImage, ...] = ()
    decision: Decision | None = None
    files: dict[str, StoredFile] = field(default_factory=dict)
    library_versions: dict[str, str] = field(default_factory=installed_versions)
    created: str = field(default_factory=timestamp)
    format: Literal[10] = 10

    @property
    def good_count(self) -> int:
        """Count all good images: those of the fit, and those that were added."""
        return self.fit.good_count + len(self.added_images)

    def threshold(self, scores: npt.NDArray[np.float32], false_alarm_rate: float) -> float:
        """Return the threshold: a person's, or that of the model's calibration scores, (n,) ascending, for a rate."""
        return self.decision.threshold if self.decision else threshold(scores, false_alarm_rate)

    @property
    def scored_by(self) -> str:
        """Return a text that models have in common if an image has one score by all of them."""
        files = [name in self.files and self.files[name].digest for name in (STUDENT, MEMORY)]
        return repr((self.recipe, self.preprocessing, self.precision, self.teacher_digest, self.distance_scales, files))

    @cached_property
    def model_id(self) -> str:
        """Return the category, with a digest of everything that affects scores, p-values, thresholds or heatmaps.

        Who decided the threshold, when and why are in it: none of that can be changed unseen.
        """
        calibration = CALIBRATION in self.files and self.files[CALIBRATION].digest
        values = (self.scored_by, calibration, self.heatmap_scale, self.decision)
        return f"{self.category}-{storage.digest(repr(values).encode())[:12]}"
