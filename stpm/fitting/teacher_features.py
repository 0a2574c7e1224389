"""The teacher's features of a category's images: computed once and kept where they fit, else computed anew."""

from __future__ import annotations

import torch
from torch import Tensor

from stpm.fitting.training_images import TrainingImages
from stpm.method.forward import Matcher, spatial_shape

_BATCH = 16
_LARGEST = torch.finfo(torch.float16).max


class TeacherFeatures:
    """Images by index, and the teacher's features of them.

    They are kept in half precision, and what it cannot hold is brought to its largest value.

    Args:
        matcher: holds the teacher.
        images: decoded.
        budget: bytes that kept features may take.
    """

    def __init__(self, matcher: Matcher, images: TrainingImages, budget: int) -> None:
        self.matcher = matcher
        self.images = images
        self._pixels = torch.from_numpy(images.pixels)
        one = self._compute(torch.arange(1))
        self.shapes = [spatial_shape(level) for level in one]
        self.size = sum(f.numel() for f in one) * 2 * len(images)
        self.kept = self.size <= budget
        self._features: list[Tensor] = []
        if self.kept:
            self._features = [self._empty(f) for f in one]
            for indices in torch.split(torch.arange(len(images)), _BATCH):
                for level, computed in zip(self._features, self._compute(indices), strict=True):
                    level[indices] = computed.clamp(-_LARGEST, _LARGEST).half()

    def __call__(self, indices: Tensor) -> list[Tensor]:
        """Features of the images of these indices, one (B, Cₗ, Hₗ, Wₗ) tensor per level."""
        return [level[indices] for level in self._features] if self.kept else self._compute(indices)

    def inputs(self, indices: Tensor) -> Tensor:
        """(B, 3, H, W) float32 network inputs."""
        return self.matcher.inputs(self._pixels[indices])

    def content_masks(self, indices: Tensor) -> list[Tensor | None]:
        """Which positions of the features of these images lie on no padding, as `Matcher.content_masks`."""
        return self.matcher.content_masks(self.images.content[indices.numpy()], self.shapes)

    def _compute(self, indices: Tensor) -> list[Tensor]:
        return self.matcher.teacher_features(self.inputs(indices))

    def _empty(self, like: Tensor) -> Tensor:
        shape = (len(self._pixels), *like.shape[1:])
        return torch.empty(shape, dtype=torch.float16, device=like.device, memory_format=torch.channels_last)
