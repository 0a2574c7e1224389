"""The forward pass behind one seam: uint8 images in, anomaly maps out. Nothing else knows what computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stpm.images import Pixels
from stpm.matching import LevelStatistics, anomaly_map, content_mask, distance_map, standardised
from stpm.networks import Trunk
from stpm.preprocessing import Boxes, Preprocessing
from stpm.recipe import Combine, Precision

Map = npt.NDArray[np.float32]


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
        preprocessing: how images became pixels; the size and normalisation of the input are used here.
        combine: how the levels' distances become one map.
        device: where to compute.
        precision: of convolutions; distances are always float32.
    """

    def __init__(
        self, teacher: Trunk, preprocessing: Preprocessing, combine: Combine, device: torch.device, precision: Precision
    ) -> None:
        self.teacher = place(teacher, device).eval().requires_grad_(False)
        self.preprocessing = preprocessing
        self.combine = combine
        self.device = device
        self.precision = precision
        mean = torch.tensor(preprocessing.mean, device=device)
        std = torch.tensor(preprocessing.std, device=device)
        self._scale = (1 / (255 * std)).view(1, 3, 1, 1)
        self._shift = (-mean / std).view(1, 3, 1, 1)

    def inputs(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 RGB to (B, 3, H, W) float32, normalised, channels last in memory."""
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

    def content_masks(self, content: Boxes, shapes: Sequence[tuple[int, int]]) -> list[Tensor] | None:
        """Which positions lie on the images and not on padding; None if there is no padding.

        Args:
            content: (B, 4) int32 content boxes of the images.
            shapes: height and width of each level.

        Returns:
            One (B, Hₗ, Wₗ) bool mask per level.
        """
        height, width = self.preprocessing.height, self.preprocessing.width
        if (content == (0, 0, width, height)).all():
            return None
        boxes = torch.from_numpy(content).to(self.device)
        return [content_mask(boxes, (height, width), shape) for shape in shapes]

    @torch.no_grad()
    def distances(self, student: Trunk, images: Pixels) -> list[Tensor]:
        """(B, H, W, 3) uint8 RGB to one (B, Hₗ, Wₗ) float32 map per level, of a student in eval mode."""
        inputs = self.inputs(torch.tensor(images))
        return compare(self.features(self.teacher, inputs), self.features(student, inputs))

    def anomaly_maps(
        self, distances: list[Tensor], content: Boxes, statistics: list[LevelStatistics] | None
    ) -> list[Map]:
        """Anomaly maps of images, each cut to its content box.

        Args:
            distances: one (B, Hₗ, Wₗ) map per level.
            content: (B, 4) int32 content boxes of the images.
            statistics: of the levels, if the recipe combines `calibrated` and they are not standardised yet.

        Returns:
            One (height, width) float32 array per image.
        """
        if statistics is not None:
            distances = standardised(distances, statistics)
        valid = self.content_masks(content, [shape_of(d) for d in distances])
        size = self.preprocessing.height, self.preprocessing.width
        maps = anomaly_map(distances, *size, self.combine, valid).cpu().numpy()
        boxes = content.tolist()
        return [
            np.ascontiguousarray(each[top:bottom, left:right])
            for each, (left, top, right, bottom) in zip(maps, boxes, strict=True)
        ]


def shape_of(level: Tensor) -> tuple[int, int]:
    """Height and width of a level's features or distances."""
    return level.shape[-2], level.shape[-1]


def compare(teacher: list[Tensor], student: list[Tensor]) -> list[Tensor]:
    """Distance maps of two sets of features, one (B, Hₗ, Wₗ) float32 per level."""
    return [distance_map(t, s) for t, s in zip(teacher, student, strict=True)]


def place(trunk: Trunk, device: torch.device) -> Trunk:
    """A trunk on a device, channels last in memory."""
    return trunk.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
