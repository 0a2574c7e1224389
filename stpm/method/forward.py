"""The forward pass that fitting, calibration and scoring share: uint8 images in, anomaly maps out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stpm.errors import ModelError
from stpm.method.backbones import Backbone, StateDict, load_backbone
from stpm.method.depthwise import Float32Depthwise
from stpm.method.fusion import AnomalyMap, fuse
from stpm.method.matching import content_mask, distance_map
from stpm.method.memory_bank import MemoryBank
from stpm.method.openvino_backend import OpenVinoBackbone
from stpm.method.preprocessing import Boxes, Preprocessing
from stpm.method.recipe import Precision, Recipe
from stpm.method.scales import DistanceScale
from stpm.options import Backend

log = logging.getLogger(__name__)


class FeatureExtractor(Protocol):
    """A backbone in eval mode, of PyTorch or compiled: (B, 3, H, W) to one (B, Cₗ, Hₗ, Wₗ) tensor per level."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, images: Tensor) -> list[Tensor]: ...


@dataclass(frozen=True)
class Parts:
    """The parts of a model, whose distances to the teacher's features are measured: a student, memory banks, or both.

    The student is in eval mode.
    """

    student: FeatureExtractor | None
    memory: tuple[MemoryBank, ...] = ()

    @classmethod
    def from_weights(
        cls, recipe: Recipe, student: StateDict | None, memory: Sequence[MemoryBank], origin: str = "the fitted student"
    ) -> Parts:
        """Build the parts of a model, on the CPU.

        Args:
            recipe: the model's recipe; its teacher and levels are used.
            student: the student's weights, by name; None if there is no student.
            memory: the memory banks.
            origin: where the student's weights come from, for errors.

        Raises:
            ModelError: if the student's weights do not match the teacher's architecture.
        """
        backbone = None if student is None else load_backbone(recipe.teacher, recipe.levels, student, origin)
        return cls(backbone, tuple(memory))

    def to(self, device: torch.device) -> Parts:
        """Move all tensors to a device."""
        student = to_device(self.student, device) if isinstance(self.student, Backbone) else self.student
        return Parts(student, tuple(bank.to(device) for bank in self.memory))

    @property
    def nbytes(self) -> int:
        """Count the bytes of all tensors."""
        memory = sum(tensor.nbytes for bank in self.memory for tensor in bank.tensors.values())
        return memory + (self.student.nbytes if self.student else 0)


@dataclass(frozen=True)
class Distances:
    """Distances of B images: one (B, Hₗ, Wₗ) float32 map for each level of the student, and for each memory bank."""

    student: tuple[Tensor, ...]
    memory: tuple[Tensor, ...]

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """Return the student's maps, then the memory's."""
        return self.student + self.memory

    @property
    def nbytes(self) -> int:
        """Count the bytes of all maps."""
        return sum(d.nbytes for d in self.maps)

    def select(self, chosen: slice) -> Distances:
        """Select some of the images."""
        return Distances(tuple(d[chosen] for d in self.student), tuple(d[chosen] for d in self.memory))

    def to(self, device: torch.device) -> Distances:
        """Move all maps to a device."""
        return Distances(tuple(d.to(device) for d in self.student), tuple(d.to(device) for d in self.memory))


class Matcher:
    """Compute the teacher's features, compare them with a model's parts, and fuse the distances.

    Args:
        teacher: backbone to freeze; it is put in eval mode.
        preprocessing: the input's size and normalisation.
        device: what to compute on.
        precision: number format of convolutions; distances are always float32.
        backend: what computes features where no gradient is needed.
    """

    def __init__(
        self,
        teacher: Backbone,
        preprocessing: Preprocessing,
        device: torch.device,
        precision: Precision,
        backend: Backend = "pytorch",
    ) -> None:
        self.preprocessing = preprocessing
        self.device = device
        self.precision = precision
        self.backend: Backend = backend
        frozen = to_device(teacher, device).eval().requires_grad_(False)
        self.teacher = self._compile(frozen)
        if self.teacher is frozen:
            # If OpenVINO cannot compile the teacher, PyTorch computes the student too.
            self.backend = "pytorch"
        mean = torch.tensor(preprocessing.mean, device=device)
        std = torch.tensor(preprocessing.std, device=device)
        self._scale = (1 / (255 * std)).view(1, 3, 1, 1)
        self._shift = (-mean / std).view(1, 3, 1, 1)

    def inputs(self, images: Tensor) -> Tensor:
        """Normalise images: (B, H, W, 3) uint8 RGB to (B, 3, H, W) float32, channels last in memory."""
        pixels = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        return torch.addcmul(self._shift, pixels, self._scale)

    def compile(self, parts: Parts) -> Parts:
        """Compile a model's student by the matcher's backend."""
        return replace(parts, student=self._compile(parts.student)) if isinstance(parts.student, Backbone) else parts

    def _compile(self, backbone: Backbone) -> FeatureExtractor:
        if self.backend == "openvino":
            try:
                return OpenVinoBackbone(backbone, *self.preprocessing.input_shape, self.precision)
            except ModelError as error:
                log.warning("%s; PyTorch computes it instead", error)
        return backbone

    def features(self, backbone: FeatureExtractor, inputs: Tensor) -> list[Tensor]:
        """Compute a backbone's features of each level, at the matcher's precision."""
        reduced = self.precision == "bfloat16"
        trains_on_cpu = self.device.type == "cpu" and torch.is_grad_enabled()
        depthwise = Float32Depthwise() if reduced and trains_on_cpu else nullcontext()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=reduced), depthwise:
            return backbone(inputs)

    def teacher_features(self, inputs: Tensor) -> list[Tensor]:
        """Compute the teacher's features of each level, without gradient."""
        with torch.no_grad():
            return self.features(self.teacher, inputs)

    def content_masks(self, content: Boxes, shapes: Sequence[tuple[int, int]]) -> list[Tensor | None]:
        """Mark the valid positions of each level, those not on padding.

        Args:
            content: (B, 4) int32 content boxes of the images.
            shapes: height and width of each level.

        Returns:
            One (B, Hₗ, Wₗ) bool mask per level, or one None per level if no image has padding.
        """
        height, width = self.preprocessing.input_shape
        if (content == (0, 0, width, height)).all():
            return [None] * len(shapes)
        boxes = torch.from_numpy(content).to(self.device)
        return [content_mask(boxes, (height, width), shape) for shape in shapes]

    @torch.no_grad()
    def distances(self, parts: Parts, inputs: Tensor, content: Boxes, teacher: Sequence[Tensor] = ()) -> Distances:
        """Measure how far the teacher's features are from each part of a model.

        Args:
            parts: a model's parts, on the matcher's device.
            inputs: (B, 3, H, W) float32, network inputs of the images.
            content: (B, 4) int32 content boxes of the same images.
            teacher: their features by the teacher, one (B, Cₗ, Hₗ, Wₗ) tensor per level; empty: compute them.
        """
        teacher = teacher or self.teacher_features(inputs)
        student: tuple[Tensor, ...] = ()
        if parts.student:
            features = self.features(parts.student, inputs)
            student = tuple(distance_map(t, s) for t, s in zip(teacher, features, strict=True))
        valid = self.content_masks(content, [spatial_shape(level) for level in teacher])
        memory = (
            bank.distance_map(teacher[bank.spec.level_index], valid[bank.spec.level_index]) for bank in parts.memory
        )
        return Distances(student, tuple(memory))

    def anomaly_maps(
        self, distances: Distances, content: Boxes, recipe: Recipe, scales: Sequence[DistanceScale]
    ) -> list[AnomalyMap]:
        """Fuse distances into one smoothed anomaly map per image, cut to the image's content box.

        Args:
            distances: distances of B images.
            content: (B, 4) int32 content boxes of the same images.
            recipe: its fusion and smoothing are used.
            scales: scale of each distance map; only fusion by quantiles needs them.
        """
        valid = self.content_masks(content, [spatial_shape(d) for d in distances.maps])
        total, *parts = fuse(
            distances.student,
            distances.memory,
            scales,
            recipe.fusion,
            recipe.student_weight,
            self.preprocessing.input_shape,
            valid,
        )
        arrays = [None if maps is None else maps.cpu().numpy() for maps in parts]
        results = []
        boxes = content.tolist()
        for i, (whole, (left, top, right, bottom)) in enumerate(zip(total.cpu().numpy(), boxes, strict=True)):
            box = slice(top, bottom), slice(left, right)
            student, memory = (None if maps is None else maps[i][box] for maps in arrays)
            anomaly_map = AnomalyMap(np.ascontiguousarray(whole[box]), student, memory)
            results.append(anomaly_map.smoothed(recipe.smoothing))
        return results


def spatial_shape(level: Tensor) -> tuple[int, int]:
    """Return height and width of a level's features or distances."""
    return level.shape[-2], level.shape[-1]


def to_device(backbone: Backbone, device: torch.device) -> Backbone:
    """Move a backbone to a device, channels last in memory."""
    return backbone.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
