"""Recipe: every choice that shapes a model, validated when made, stored with the model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from stpm.errors import ConfigError, DataError
from stpm.method.preprocessing import LARGEST_SIDE, Resize
from stpm.options import Integers, Size, option

Preset = Literal["default", "paper", "notebook"]
Precision = Literal["float32", "bfloat16"]
StudentKind = Literal["stpm", "none"]
FusionMethod = Literal["product", "sum", "quantile"]

# A held-out image's parts are brought to one scale by the other held-out images.
_LEAST_FOR_QUANTILES = 2


@dataclass(frozen=True)
class Fusion:
    """How distance maps become an anomaly map and a score.

    Args:
        method: `product` or `sum` of the student's levels, or `quantile`: the mean of all parts, each on its scale.
        smoothing: standard deviation of the Gaussian that smooths the anomaly map, pixels; 0: none.
        top_fraction: of an image's pixels, those of the highest values whose mean is its score; 0: the maximum.
    """

    method: FusionMethod
    smoothing: float = 0.0
    top_fraction: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """How one model is fitted. The defaults are those of preset `paper` (Wang et al., section 4).

    Raises:
        ConfigError: if a value, or a combination of values, cannot be run.
    """

    teacher: str = option("resnet18.tv_in1k", "teacher as ARCHITECTURE.TAG of timm, or `demo`: the package's own")
    teacher_weights: str = option(
        "",
        "weights of the teacher from a .safetensors or .pth file (URI) instead; `random`: an untrained control",
    )
    levels: Integers = option(Integers((1, 2, 3)), "pyramid levels, as timm's out_indices, finest first")
    size: Size = option(
        Size("256"),
        "height x width of the networks' input in pixels, such as 640x256; one number: a square; `auto`: the training "
        "images' median proportions and number of pixels, at least 65536 and at most --pixels, in multiples of 32",
    )
    pixels: int = option(163_840, "budget of pixels of the input when size is auto")
    resize: Resize = option(
        "stretch",
        "`stretch`: the whole image, whatever its proportions; `crop`: the largest central part that has the input's "
        "proportions; `fit`: the whole image in its own proportions, with padding around it that counts nowhere; an "
        "image whose aspect ratio is within 10 % of the input's is stretched instead",
    )
    normalisation: Literal["teacher", "imagenet", "none"] = option(
        "teacher",
        "`teacher`: mean and deviation per channel, and interpolation, that timm names for the teacher; `imagenet`: "
        "ImageNet's, bilinear; `none`: pixels from 0 to 1, bilinear",
    )
    optimiser: Literal["sgd", "adam"] = option("sgd", "optimiser")
    learning_rate: float = option(0.4, "learning rate, at its highest")
    schedule: Literal["constant", "cosine"] = option("constant", "learning rate over time; `cosine` ends at 0")
    warmup_epochs: int = option(0, "epochs in which the learning rate rises linearly to its highest")
    momentum: float = option(0.9, "momentum of sgd")
    weight_decay: float = option(1e-4, "weight decay")
    batch: int = option(32, "images per step")
    epochs: int = option(100, "passes over the training images")
    least_steps: int = option(
        0, "steps that a fit makes at least: where the images are so few that `epochs` would make fewer, it runs longer"
    )
    early_stopping: int = option(0, "epochs without a lower validation loss after which fitting ends; 0: never")
    loss_factor: float = option(
        32.0, "factor on the mean loss of a batch before its gradient; 32 is the sum over a full batch of 32"
    )
    validation_share: float = option(0.2, "share of the defect-free images held out, for validation and calibration")
    keep: Literal["best", "last"] = option("best", "epoch that is kept: lowest validation loss, or the last")
    zero_init_residual: bool = option(
        False, "start the student's residual branches at zero, as timm does, where the architecture has them"
    )
    student: StudentKind = option(
        "stpm", "`stpm`: a student of the teacher's architecture (Wang et al.); `none`: the memory alone"
    )
    memory: int = option(
        0,
        "vectors of normal teacher features that are kept per memory bank, two banks for each of --memory-levels; an "
        "image is as anomalous as it is far from the nearest of them; 0: the student alone",
    )
    memory_levels: Integers = option(Integers((2, 3)), "pyramid levels that have memory banks, some of --levels")
    fusion: FusionMethod = option(
        "product",
        "how the distance maps become one: `product` or `sum` of the student's levels, or `quantile`: the mean of the "
        "student's levels and the memory banks, each brought to one scale by its quantiles on held-out images",
    )
    smoothing: float = option(
        0.0, "standard deviation of the Gaussian that smooths the anomaly map, in pixels of the input; 0: none"
    )
    top_fraction: float = option(
        0.0, "an image's score is the mean of this fraction of its pixels, the highest ones; 0: of the highest alone"
    )
    calibration_folds: int = option(
        0,
        "calibrate on every good image: fit this many more models, each without a fraction of the images, two at "
        "least, that it then scores; 0: calibrate on the held-out images alone",
    )
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of convolutions; `auto`: bfloat16 where the device computes it natively, else float32"
    )
    seed: int = option(0, "seed of the split, the student's initialisation and the order of the images")

    def held_out(self, images: int) -> int:
        """How many of so many good images are held out: the share, at least what is needed, and never all."""
        return min(max(round(images * self.validation_share), self._least_held_out), images - 1)

    def folds_of(self, images: int) -> int:
        """How many folds calibrate on so many good images: as asked for, with at least two images in each."""
        return min(self.calibration_folds, images // 2)

    def calibrating(self, images: int) -> int:
        """How many of so many good images calibrate the model."""
        return images if self.calibration_folds else self.held_out(images)

    def check_images(self, images: int) -> None:
        """Raises DataError if so many good images are too few."""
        least, why = 1 + self._least_held_out, f"1 to fit on and {self._least_held_out} to hold out"
        if self.calibration_folds:
            least, why = 4, "2 in each of 2 folds"
        if images < least:
            raise DataError(f"good images: {images}; this recipe needs at least {least}, {why}; give more")

    @property
    def _least_held_out(self) -> int:
        return _LEAST_FOR_QUANTILES if self.fusion == "quantile" else 1

    @property
    def fusing(self) -> Fusion:
        """How distance maps become an anomaly map and a score."""
        return Fusion(self.fusion, self.smoothing, self.top_fraction)

    def for_images(self, images: int) -> Recipe:
        """The recipe with the epochs that a category of so many good images gets."""
        steps_per_epoch = math.ceil(max(images - self.held_out(images), 1) / self.batch)
        return dataclasses.replace(self, epochs=max(self.epochs, math.ceil(self.least_steps / steps_per_epoch)))

    def __post_init__(self) -> None:
        _require(
            bool(self.levels) and list(self.levels) == sorted(set(self.levels)) and self.levels[0] >= 0,
            "levels",
            self.levels,
            "give increasing levels, such as 1,2,3",
        )
        _require(0 <= self.memory <= 1_000_000, "memory", self.memory, "give 0 to 1000000")
        _require(
            self.memory > 0 or self.student != "none",
            "student",
            self.student,
            "give --memory too, such as 2000: a model needs one of the two",
        )
        usable = sorted(set(self.memory_levels) & set(self.levels))
        _require(
            not self.memory or (bool(usable) and list(self.memory_levels) == usable),
            "memory_levels",
            self.memory_levels,
            f"give some of the levels {','.join(map(str, self.levels))}, increasing",
        )
        _require(
            not self.memory or self.fusion == "quantile",
            "fusion",
            self.fusion,
            "give quantile: a student's and a memory's distances have no scale in common; or --memory 0",
        )
        _require(0 <= self.smoothing <= 100, "smoothing", self.smoothing, "give 0 to 100 pixels")
        _require(0 <= self.top_fraction < 1, "top_fraction", self.top_fraction, "give 0 to below 1")
        sides = self.size.sides
        _require(
            sides is None or 32 <= min(sides) <= max(sides) <= LARGEST_SIDE,
            "size",
            self.size,
            f"give 32 to {LARGEST_SIDE} pixels each, or auto",
        )
        _require(1024 <= self.pixels <= LARGEST_SIDE**2, "pixels", self.pixels, f"give 1024 to {LARGEST_SIDE**2}")
        for name in ("batch", "epochs"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "give at least 1")
        for name in ("learning_rate", "loss_factor"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, name, value, "give a number above 0")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "give 0 to below 1")
        _require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "give 0 or more")
        _require(
            0 < self.validation_share < 1,
            "validation_share",
            self.validation_share,
            "give a share between 0 and 1: calibration needs held-out images",
        )
        _require(0 <= self.seed < 2**31, "seed", self.seed, "give 0 to 2147483647")
        for name in ("warmup_epochs", "early_stopping", "least_steps"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "give 0 or more")
        _require(
            self.warmup_epochs < self.epochs,
            "warmup_epochs",
            self.warmup_epochs,
            f"give fewer than the {self.epochs} epochs, or raise --epochs",
        )
        _require(
            self.calibration_folds != 1 and self.calibration_folds >= 0,
            "calibration_folds",
            self.calibration_folds,
            "give 2 or more, or 0",
        )
        _require(bool(self.teacher), "teacher", self.teacher, "give ARCHITECTURE.TAG, such as resnet18.tv_in1k")


def _require(holds: bool, name: str, value: object, remedy: str) -> None:
    if not holds:
        raise ConfigError(f"{name.replace('_', '-')} is {value!r}; {remedy}")


# `default` was chosen without a label of a real defect: see docs/recipes.md.
PRESETS: dict[Preset, Recipe] = {
    "default": Recipe(
        size=Size("auto"),
        resize="fit",
        schedule="cosine",
        warmup_epochs=1,
        batch=8,
        epochs=5,
        least_steps=100,
        memory=2000,
        fusion="quantile",
        top_fraction=0.005,
    ),
    "paper": Recipe(),
    "notebook": Recipe(
        normalisation="none",
        optimiser="adam",
        learning_rate=4e-4,
        weight_decay=0.0,
        batch=4,
        epochs=20,
        loss_factor=1.0,
        keep="last",
        zero_init_residual=True,
    ),
}
