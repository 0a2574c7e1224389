"""Recipe: every choice that shapes a model, validated when made and stored with the model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from stpm.errors import ConfigError, DataError
from stpm.options import Integers, Options, Size, flag, option
from stpm.path_pattern import PathPattern

Preset = Literal["default", "paper", "notebook"]
Precision = Literal["float32", "bfloat16"]
WantedPrecision = Literal["auto", "float32", "bfloat16"]
Resize = Literal["stretch", "crop", "fit"]
StudentKind = Literal["stpm", "none"]
FusionMethod = Literal["product", "sum", "quantile"]
# Of an image or an input, pixels.
MAX_SIDE = 4096


@dataclass(frozen=True)
class Recipe(Options):
    """How to fit one model. The defaults are preset `paper` (Wang et al., section 4).

    Raises:
        ConfigError: if a value is out of range, or two values contradict each other.
    """

    teacher: str = option("resnet18.tv_in1k", "teacher as ARCHITECTURE.TAG of timm; `demo`: the packaged one")
    teacher_weights: str = option(
        "", "read the teacher's weights from this .safetensors or .pth file (URI); `random`: an untrained control"
    )
    levels: Integers = option(
        Integers((1, 2, 3)),
        "pyramid levels of the student and of the fine view's memory banks, as timm's out_indices, finest first; of a "
        "transformer its blocks, such as 5,8,11",
    )
    size: Size = option(
        Size("256"),
        "height x width of the networks' input in pixels, such as 640x256; one number: a square; `auto`: the training "
        "images' median proportions and number of pixels, at least 65536 and at most --pixels, in multiples of 32 or "
        "of a transformer's patches",
    )
    pixels: int = option(
        163_840,
        "largest number of input pixels when size is auto; more show smaller defects, and cost time and memory in "
        "proportion",
        minimum=1024,
        maximum=MAX_SIDE**2,
    )
    coarse_pixels: int = option(
        0,
        "pixels of a second, coarse view of the same image, in which a part that is missing or misplaced is seen as a "
        "whole; the student is in this view, memory banks are in both; 0, no memory, or small images: one view",
        minimum=0,
        maximum=MAX_SIDE**2,
    )
    coarse_levels: Integers = option(
        Integers(),
        "pyramid levels with memory banks in the coarse view; none: those of --levels but the finest, and the next one "
        "if the architecture has it, of which those with at least 32 channels; of a transformer --levels",
    )
    coarse_weight: float = option(
        0.2,
        "weight of the coarse view in the soft maximum of the views' maps; the fine view has the rest of 1",
        above=0,
        below=1,
    )
    resize: Resize = option(
        "stretch",
        "`stretch`: scale the whole image to the input; `crop`: take the largest central part with the input's "
        "proportions; `fit`: keep the image's proportions and pad around it (padding counts nowhere), or stretch it "
        "if its aspect ratio is within 10 % of the input's",
    )
    normalisation: Literal["teacher", "imagenet", "none"] = option(
        "teacher",
        "mean and std per channel, and interpolation. `teacher`: those that timm lists for the teacher; `imagenet`: "
        "ImageNet's, bilinear; `none`: pixels from 0 to 1, bilinear",
    )
    optimiser: Literal["sgd", "adam"] = option("sgd", "optimiser")
    learning_rate: float = option(0.4, "highest learning rate", above=0)
    schedule: Literal["constant", "cosine"] = option("constant", "learning rate over time; `cosine` ends at 0")
    warmup_epochs: int = option(0, "epochs in which the learning rate rises linearly to its highest", minimum=0)
    momentum: float = option(0.9, "momentum of sgd", minimum=0, below=1)
    weight_decay: float = option(1e-4, "weight decay", minimum=0)
    batch_size: int = option(32, "training images per step", minimum=1)
    epochs: int = option(100, "runs through the training images", minimum=1)
    min_steps: int = option(
        0, "smallest number of steps of a fit: a category with few images gets more epochs", minimum=0
    )
    early_stopping: int = option(0, "end after this many epochs without a lower validation loss; 0: never", minimum=0)
    loss_factor: float = option(
        32.0,
        "multiply a batch's mean loss by this before its gradient; 32 makes it the sum over a batch of 32",
        above=0,
    )
    held_out_fraction: float = option(
        0.2,
        "fraction of the defect-free images to hold out for validation and calibration",
        above=0,
        below=1,
    )
    keep: Literal["best", "last"] = option(
        "best", "epoch to keep: the one with the lowest validation loss, or the last"
    )
    zero_init_residual: bool = option(
        False, "start the student's residual branches at zero, as timm does, where the architecture has them"
    )
    student: StudentKind = option(
        "stpm", "`stpm`: a student of the teacher's architecture (Wang et al.); `none`: the memory alone"
    )
    memory: int = option(
        0,
        "vectors of normal teacher features in each memory bank, chosen among about 65,536; two banks for each of "
        "--memory-levels; the distance to the nearest vector counts as anomaly; 0: no memory, the student alone",
        minimum=0,
        maximum=1_000_000,
    )
    memory_levels: Integers = option(
        Integers(), "pyramid levels with memory banks, some of --levels; none: those with at least 32 channels"
    )
    brightness: float = option(
        0.0,
        "fill half of the memory banks from training images that are brighter or darker by up to this fraction: lamps "
        "age; 0: as they are",
        minimum=0,
        below=1,
    )
    fusion: FusionMethod = option(
        "product",
        "how to combine distance maps. `product` or `sum`: of the student's levels; `quantile`: in each view the mean "
        "of the student's levels and that of the memory banks, each scaled by its quantiles on held-out images, "
        "averaged by --student-weight; of two views the soft maximum",
    )
    student_weight: float = option(
        0.5, "weight of the student where fusion is `quantile`; the memory has the rest of 1", above=0, below=1
    )
    smoothing: float = option(
        0.0, "std of the Gaussian that smooths the anomaly map, in input pixels; 0: none", minimum=0, maximum=100
    )
    top_fraction: float = option(
        0.0,
        "score an image by the mean of this fraction of its pixels, the highest ones; 0: by the highest pixel",
        minimum=0,
        below=1,
    )
    calibration_folds: int = option(
        0,
        "calibrate on every good image: split them into this many folds, at least two, and score each fold by memory "
        "banks without it; the model's banks hold all images. 0, or no memory: calibrate on the held-out images alone",
        minimum=0,
    )
    group_from: str = option(
        "",
        "what in a training image's path names its part, lot or video, such as {group}_{name}: images of one group are "
        "held out together; copies always are",
    )
    precision: WantedPrecision = option(
        "auto",
        "precision of convolutions; `auto`: bfloat16 where all devices of the fit compute it natively, else float32",
    )
    seed: int = option(
        0, "seed of the split, the student's initialisation and the order of the images", minimum=0, maximum=2**31 - 1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        levels, memory_levels, sides = list(self.levels), list(self.memory_levels), self.size.sides
        in_range = sides is None or all(32 <= side <= MAX_SIDE for side in sides)
        for name, holds, valid in (
            ("teacher", bool(self.teacher), "ARCHITECTURE.TAG, such as resnet18.tv_in1k"),
            ("levels", _are_levels(self.levels), "increasing levels, such as 1,2,3"),
            (
                "coarse_levels",
                not self.coarse_levels or _are_levels(self.coarse_levels),
                "increasing levels, such as 2,3",
            ),
            ("size", in_range, f"32 to {MAX_SIDE} pixels each, or auto"),
            ("warmup_epochs", self.warmup_epochs < self.epochs, f"fewer than the {self.epochs} epochs"),
            (
                "student",
                self.student != "none" or self.memory > 0,
                "--memory too, such as 2000: a model needs a student or a memory",
            ),
            (
                "memory_levels",
                not self.memory or memory_levels == sorted({*memory_levels} & {*levels}),
                f"some of the levels {','.join(map(str, levels))}, increasing",
            ),
            ("coarse_pixels", not 0 < self.coarse_pixels < 1024, "1024 or more, or 0"),
            (
                "fusion",
                not self.memory or self.fusion == "quantile",
                "quantile: distances of a student and of a memory have different scales; or give --memory 0",
            ),
            ("calibration_folds", self.calibration_folds != 1, "2 or more, or 0"),
        ):
            if not holds:
                raise ConfigError(f"{flag(name)} is {getattr(self, name)!r}; give {valid}")
        if self.group_from:
            self.groups  # noqa: B018

    @cached_property
    def groups(self) -> PathPattern:
        """Return the pattern that finds an image's group, where there is one. Raises ConfigError if it is none."""
        return PathPattern(self.group_from, "group", "--group-from")

    @property
    def max_views(self) -> int:
        """Return 2 if a model has a coarse view where images are large enough. The fine view needs a memory."""
        return 2 if self.coarse_pixels and self.memory else 1

    @property
    def folds(self) -> int:
        """Return how many calibration folds are wanted. They need a memory: the student knows all of its images."""
        return self.calibration_folds if self.memory else 0

    def held_out_count(self, images: int) -> int:
        """Return how many of a category's good images the student is not trained on, but validated with.

        They are a fraction, and at least what fusion needs, if they calibrate the model. Where folds calibrate a model
        without a student, there are none.
        """
        if self.folds and self.student == "none":
            return 0
        least = 1 if self.folds else self._min_calibration
        return min(max(round(images * self.held_out_fraction), least), images - 1)

    def fold_count(self, images: int) -> int:
        """Return how many calibration folds a category's good images make: no more than there are images."""
        return min(self.folds, images)

    def calibration_count(self, images: int) -> int:
        """Return how many of a category's good images calibrate its model."""
        return images if self.folds else self.held_out_count(images)

    @property
    def min_images(self) -> int:
        """Return how many good images a category needs, to fit on and to calibrate with."""
        return 1 + self._min_calibration

    def check_image_count(self, images: int) -> None:
        """Raise DataError if a category has too few good images."""
        if images < self.min_images:
            raise DataError(
                f"good images: {images}; this recipe needs at least {self.min_images}, 1 to fit on and "
                f"{self._min_calibration} to calibrate with; give more"
            )

    def for_image_count(self, images: int) -> Recipe:
        """Return the recipe with as many epochs as a category with this many good images needs for `min_steps`."""
        steps_per_epoch = math.ceil(max(images - self.held_out_count(images), 1) / self.batch_size)
        return dataclasses.replace(self, epochs=max(self.epochs, math.ceil(self.min_steps / steps_per_epoch)))

    @property
    def _min_calibration(self) -> int:
        # With quantiles, each calibration image is scaled by the others.
        return 2 if self.fusion == "quantile" else 1


def _are_levels(levels: Integers) -> bool:
    return min(levels, default=-1) >= 0 and list(levels) == sorted({*levels})


# The products' labels were seen while `default` was chosen: see docs/recipes.md.
PRESETS: dict[Preset, Recipe] = {
    "default": Recipe(
        size=Size("auto"),
        pixels=491_520,
        coarse_pixels=36_864,
        resize="fit",
        schedule="cosine",
        warmup_epochs=1,
        batch_size=2,
        epochs=5,
        min_steps=400,
        memory=2000,
        calibration_folds=5,
        brightness=0.1,
        fusion="quantile",
        top_fraction=0.005,
    ),
    "paper": Recipe(),
    "notebook": Recipe(
        normalisation="none",
        optimiser="adam",
        learning_rate=4e-4,
        weight_decay=0.0,
        batch_size=4,
        epochs=20,
        loss_factor=1.0,
        keep="last",
        zero_init_residual=True,
    ),
}
