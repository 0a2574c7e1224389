"""The frozen teacher on a device: uint8 images in, features of each pyramid level out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor

from stpm.errors import ModelError
from stpm.method.backbones import Backbone
from stpm.method.depthwise import Float32Depthwise
from stpm.method.matching import content_mask
from stpm.method.openvino_backend import OpenVinoBackbone
from stpm.method.preprocessing import Boxes, Preprocessing
from stpm.method.recipe import Precision
from stpm.options import Backend

log = logging.getLogger(__name__)


class FeatureExtractor(Protocol):
    """A backbone in eval mode, of PyTorch or compiled: (B, 3, H, W) to one (B, Cₗ, Hₗ, Wₗ) tensor per level."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, images: Tensor) -> list[Tensor]: ...


class Teacher:
    """A frozen backbone with its preprocessing on a device. Detectors whose teacher is the same share one.

    Args:
        backbone: to freeze; it is put in eval mode.
        preprocessing: the input's size and normalisation.
        device: what to compute on.
        precision: number format of convolutions; distances are always float32.
        backend: what computes features where no gradient is needed.
    """

    def __init__(
        self,
        backbone: Backbone,
        preprocessing: Preprocessing,
        device: torch.device,
        precision: Precision,
        backend: Backend = "pytorch",
    ) -> None:
        self.preprocessing = preprocessing
        self.device = device
        self.precision = precision
        self.backend: Backend = backend
        frozen = to_device(backbone, device).eval().requires_grad_(False)
        self.backbone = self._compile(frozen)
        if self.backbone is frozen:
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

    def compile(self, backbone: Backbone) -> FeatureExtractor:
        """Prepare another backbone of the same architecture, a student in eval mode, to be computed as this one is."""
        return self._compile(to_device(backbone, self.device))

    def _compile(self, backbone: Backbone) -> FeatureExtractor:
        if self.backend == "openvino":
            try:
                return OpenVinoBackbone(backbone, *self.preprocessing.input_shape, self.precision)
            except ModelError as error:
                log.warning("%s; PyTorch computes it instead", error)
        return backbone

    def compute(self, backbone: FeatureExtractor, inputs: Tensor) -> list[Tensor]:
        """Compute the features of a backbone, this one or a student, at the teacher's precision."""
        reduced = self.precision == "bfloat16"
        trains_on_cpu = self.device.type == "cpu" and torch.is_grad_enabled()
        depthwise = Float32Depthwise() if reduced and trains_on_cpu else nullcontext()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=reduced), depthwise:
            return backbone(inputs)

    def __call__(self, inputs: Tensor) -> list[Tensor]:
        """Compute the teacher's features, one (B, Cₗ, Hₗ, Wₗ) tensor per level, without gradient."""
        with torch.no_grad():
            return self.compute(self.backbone, inputs)

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


def spatial_shape(level: Tensor) -> tuple[int, int]:
    """Return height and width of a level's features or distances."""
    return level.shape[-2], level.shape[-1]


def to_device(backbone: Backbone, device: torch.device) -> Backbone:
    """Move a backbone to a device, channels last in memory."""
    return backbone.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
