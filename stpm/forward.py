"""The forward pass behind one seam: uint8 images in, anomaly maps out. Nothing else knows what computes it."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stpm.images import Pixels
from stpm.matching import LevelStatistics, anomaly_map, distance_map, standardised
from stpm.networks import Trunk
from stpm.recipe import Precision, Recipe

# Per channel, of pixels from 0 to 1: the values every ImageNet model of torchvision was trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def pick_device() -> torch.device:
    """The accelerator that this process was given, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(wanted: Literal["auto", "float32", "bfloat16"], device: torch.device) -> Precision:
    """`auto` made definite: bfloat16 where the device computes it natively (emulated, it is slower)."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


class Matcher:
    """A teacher, and how its features and a student's are computed and compared.

    Args:
        teacher: frozen trunk; it is put in eval mode.
        recipe: the model's recipe: normalisation, input size and how levels combine.
        device: where to compute.
        precision: of convolutions; distances are always float32.
    """

    def __init__(self, teacher: Trunk, recipe: Recipe, device: torch.device, precision: Precision) -> None:
        self.teacher = place(teacher, device).eval().requires_grad_(False)
        self.recipe = recipe
        self.device = device
        self.precision = precision
        imagenet = recipe.normalisation == "imagenet"
        mean = torch.tensor(IMAGENET_MEAN if imagenet else (0.0,) * 3, device=device)
        std = torch.tensor(IMAGENET_STD if imagenet else (1.0,) * 3, device=device)
        self._scale = (1 / (255 * std)).view(1, 3, 1, 1)
        self._shift = (-mean / std).view(1, 3, 1, 1)

    def inputs(self, images: Tensor) -> Tensor:
        """(B, size, size, 3) uint8 RGB to (B, 3, size, size) float32, normalised, channels last in memory."""
        pixels = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        return torch.addcmul(self._shift, pixels, self._scale)

    def features(self, trunk: Trunk, inputs: Tensor) -> list[Tensor]:
        """Features of each level at the matcher's precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            features: list[Tensor] = trunk(inputs)
        return features

    def teacher_features(self, inputs: Tensor) -> list[Tensor]:
        """Features of the teacher, without gradient."""
        with torch.no_grad():
            return self.features(self.teacher, inputs)

    @torch.no_grad()
    def distances(self, student: Trunk, images: Pixels) -> list[Tensor]:
        """(B, size, size, 3) uint8 RGB to one (B, Hₗ, Wₗ) float32 map per level, of a student in eval mode."""
        inputs = self.inputs(torch.tensor(images))
        return compare(self.features(self.teacher, inputs), self.features(student, inputs))

    def anomaly_maps(
        self, distances: list[Tensor], statistics: list[LevelStatistics] | None
    ) -> npt.NDArray[np.float32]:
        """(B, size, size) float32 from the levels' distances; `statistics` if the recipe combines `calibrated`."""
        if statistics is not None:
            distances = standardised(distances, statistics)
        return anomaly_map(distances, self.recipe.size, self.recipe.size, self.recipe.combine).cpu().numpy()


def compare(teacher: list[Tensor], student: list[Tensor]) -> list[Tensor]:
    """Distance maps of two sets of features, one (B, Hₗ, Wₗ) float32 per level."""
    return [distance_map(t, s) for t, s in zip(teacher, student, strict=True)]


def place(trunk: Trunk, device: torch.device) -> Trunk:
    """A trunk on a device, channels last in memory."""
    return trunk.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
