"""The forward pass that fitting and scoring share: uint8 images in, anomaly maps out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stpm.method.backbones import Backbone
from stpm.method.calibration import PartScale
from stpm.method.fusion import AnomalyMap, fuse
from stpm.method.matching import content_mask, distance_map
from stpm.method.memory_bank import MemoryBank
from stpm.method.preprocessing import Boxes, Preprocessing
from stpm.method.recipe import Fusion, Precision


def pick_device() -> torch.device:
    """The accelerator that this process was given, or the CPU.

    On a GPU, from here on float32 is float32 (cuDNN's default is TF32, which keeps 10 of its 23 bits), and cuDNN takes
    algorithms that give the same bits for the same input.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
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


@dataclass(frozen=True)
class Parts:
    """What a model compares the teacher's features with: a student in eval mode, memory banks, or both."""

    student: Backbone | None
    memory: tuple[MemoryBank, ...] = ()

    def to(self, device: torch.device) -> Parts:
        student = self.student and to_device(self.student, device)
        return Parts(student, tuple(bank.to(device) for bank in self.memory))

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        tensors = [tensor for bank in self.memory for tensor in (bank.mean, bank.whitening, bank.vectors)]
        return sum(t.nbytes for t in (*tensors, *(self.student.state_dict().values() if self.student else ())))


@dataclass(frozen=True)
class Distances:
    """One (B, Hₗ, Wₗ) float32 map for each level of the student, and for each memory bank."""

    student: tuple[Tensor, ...]
    memory: tuple[Tensor, ...]

    @property
    def maps(self) -> tuple[Tensor, ...]:
        return self.student + self.memory

    @property
    def nbytes(self) -> int:
        """Of all maps."""
        return sum(d.nbytes for d in self.maps)

    def images(self, part: slice) -> Distances:
        """Those of some of the images."""
        return Distances(tuple(d[part] for d in self.student), tuple(d[part] for d in self.memory))

    @staticmethod
    def concatenate(batches: Sequence[Distances]) -> Distances:
        """Those of several batches as one, in their order."""
        student = zip(*(batch.student for batch in batches), strict=True)
        memory = zip(*(batch.memory for batch in batches), strict=True)
        return Distances(tuple(map(torch.cat, student)), tuple(map(torch.cat, memory)))

    def to(self, device: torch.device) -> Distances:
        return Distances(tuple(d.to(device) for d in self.student), tuple(d.to(device) for d in self.memory))


class Matcher:
    """A teacher, and how its features are computed and compared with what a model learnt.

    Args:
        teacher: frozen backbone; it is put in eval mode.
        preprocessing: how images became pixels; the size and normalisation of the input are used here.
        device: where to compute.
        precision: of convolutions; distances are always float32.
    """

    def __init__(
        self, teacher: Backbone, preprocessing: Preprocessing, device: torch.device, precision: Precision
    ) -> None:
        self.teacher = to_device(teacher, device).eval().requires_grad_(False)
        self.preprocessing = preprocessing
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

    def features(self, backbone: Backbone, inputs: Tensor) -> list[Tensor]:
        """Features of each level at the matcher's precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            features: list[Tensor] = backbone(inputs)
        return features

    def teacher_features(self, inputs: Tensor) -> list[Tensor]:
        """Features of the teacher, without gradient."""
        with torch.no_grad():
            return self.features(self.teacher, inputs)

    def content_masks(self, content: Boxes, shapes: Sequence[tuple[int, int]]) -> list[Tensor | None]:
        """Which positions lie on the images and not on padding.

        Args:
            content: (B, 4) int32 content boxes of the images.
            shapes: height and width of each level.

        Returns:
            One (B, Hₗ, Wₗ) bool mask per level; None for each if there is no padding.
        """
        height, width = self.preprocessing.height, self.preprocessing.width
        if (content == (0, 0, width, height)).all():
            return [None] * len(shapes)
        boxes = torch.from_numpy(content).to(self.device)
        return [content_mask(boxes, (height, width), shape) for shape in shapes]

    @torch.no_grad()
    def distances(self, parts: Parts, teacher: Sequence[Tensor], inputs: Tensor, content: Boxes) -> Distances:
        """How far the teacher's features are from what each part of a model knows.

        Args:
            parts: of the model, on the matcher's device.
            teacher: features of the images, one (B, Cₗ, Hₗ, Wₗ) tensor per level.
            inputs: (B, 3, H, W) network inputs of the same images.
            content: (B, 4) int32 content boxes of the same images.
        """
        student: tuple[Tensor, ...] = ()
        if parts.student:
            features = self.features(parts.student, inputs)
            student = tuple(distance_map(t, s) for t, s in zip(teacher, features, strict=True))
        valid = self.content_masks(content, [shape_of(level) for level in teacher])
        memory = (bank.distance_map(teacher[bank.level], valid[bank.level]) for bank in parts.memory)
        return Distances(student, tuple(memory))

    def anomaly_maps(
        self, distances: Distances, content: Boxes, fusion: Fusion, scales: Sequence[PartScale]
    ) -> list[AnomalyMap]:
        """Anomaly maps of images, each cut to its content box.

        Args:
            distances: of B images.
            content: (B, 4) int32 content boxes of the same images.
            fusion: how they become one map.
            scales: of the maps, where fusion brings them to one scale.
        """
        valid = self.content_masks(content, [shape_of(d) for d in distances.maps])
        size = self.preprocessing.height, self.preprocessing.width
        total, *parts = fuse(distances.student, distances.memory, scales, fusion, size, valid)
        arrays = [None if maps is None else maps.cpu().numpy() for maps in parts]
        results = []
        for i, (each, (left, top, right, bottom)) in enumerate(zip(total.cpu().numpy(), content.tolist(), strict=True)):
            box = slice(top, bottom), slice(left, right)
            student, memory = (None if maps is None else maps[i][box] for maps in arrays)
            anomaly_map = AnomalyMap(np.ascontiguousarray(each[box]), student, memory)
            results.append(anomaly_map.smoothed(fusion.smoothing))
        return results


def shape_of(level: Tensor) -> tuple[int, int]:
    """Height and width of a level's features or distances."""
    return level.shape[-2], level.shape[-1]


def to_device(backbone: Backbone, device: torch.device) -> Backbone:
    """A backbone on a device, channels last in memory."""
    return backbone.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
