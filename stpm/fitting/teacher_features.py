"""The teacher's features of a category's images: computed once and cached if they fit, else recomputed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stpm.fitting.splits import Indices, split_batches
from stpm.fitting.training_images import TrainingImages
from stpm.fitting.turns import take_turn
from stpm.method.teacher import Inputs, Teacher, spatial_shape

_MAX_HALF = torch.finfo(torch.float16).max


class TeacherFeatures:
    """A category's images and the teacher's features of them, by the images' indices.

    Cached features are rounded to half precision, and clamped to its range.

    Args:
        images: the category's decoded images.
        ram: bytes of RAM that images, cached features and what `ram_left` is used for may take together.
        gpu_ram: bytes that features may take on a GPU. All of them are cached, or none.
    """

    def __init__(self, teacher: Teacher, images: TrainingImages, ram: int, gpu_ram: int = 0) -> None:
        self.teacher = teacher
        self.images = images
        self.ram_left = ram if images.on_disk else ram - images.pixels.nbytes
        self._pixels = torch.from_numpy(images.pixels)
        first = self._compute(np.arange(1))
        self.shapes = [spatial_shape(level) for level in first]
        self.channels = [level.shape[1] for level in first]
        self.nbytes = sum(level.numel() for level in first) * 2 * len(images)
        on_cpu = teacher.device.type == "cpu"
        self.cached = self.nbytes <= (self.ram_left if on_cpu else gpu_ram)
        self._features: list[Tensor] = []
        if self.cached:
            self.ram_left -= self.nbytes if on_cpu else 0
            self._features = [self._allocate(level) for level in first]
            for batch in self.batches(np.arange(len(images))):
                for level, computed in zip(self._features, self._compute(batch), strict=True):
                    level[torch.from_numpy(batch)] = computed.clamp(-_MAX_HALF, _MAX_HALF).half()

    def __call__(self, indices: Indices) -> list[Tensor]:
        """Return the features of B images, of all levels of the teacher, (B, Cₗ, Hₗ, Wₗ) each."""
        if not self.cached:
            return self._compute(indices)
        take_turn()
        chosen = torch.from_numpy(indices)
        return [level[chosen] for level in self._features]

    def batches(self, indices: Indices) -> list[Indices]:
        """Split images into batches to evaluate. Results do not depend on their size: there are no batch statistics."""
        return split_batches(indices, self.teacher.preprocessing.batch_size)

    def inputs(self, indices: Indices) -> Inputs:
        """Return the teacher's inputs of B images."""
        return self.teacher.inputs(self._pixels[torch.from_numpy(indices)])

    def brightened(self, indices: Indices, factors: npt.NDArray[np.float32]) -> list[Tensor]:
        """Return the features of B images whose values, padding excepted, are multiplied by a factor, up to 255.

        `factors` are (B,) float32.
        """
        take_turn()
        pixels = self._pixels[torch.from_numpy(indices)].clone()
        boxes = self.images.content[indices].boxes.tolist()
        for image, factor, (left, top, right, bottom) in zip(pixels, factors.tolist(), boxes, strict=True):
            part = image[top:bottom, left:right]
            part.copy_((part * factor).round().clamp(max=255))
        return self.teacher(self.teacher.inputs(pixels))

    def content_masks(self, indices: Indices) -> list[Tensor | None]:
        """Mask the positions of the features that are on no padding, as `Teacher.content_masks` does."""
        return self.teacher.content_masks(self.images.content[indices], self.shapes)

    def of_student(self, indices: Indices, levels: Sequence[int]) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        """Return a student's inputs of B images, and its targets: the teacher's features in its view, and their masks.

        The inputs are (B, 3, H, W) float32; there are features and a mask, or None, for each of the student's levels.
        """
        take_turn()
        chosen, of_levels = torch.from_numpy(indices), self.teacher.student_indices(levels)
        inputs = self.teacher.student_inputs(self._pixels[chosen])
        masks = self.teacher.content_masks(self.images.content[indices], [self.shapes[i] for i in of_levels])
        if self.cached:
            return inputs, [self._features[i][chosen] for i in of_levels], masks
        computed = self.teacher.student_targets(inputs)
        return inputs, [computed[i] for i in of_levels], masks

    def _compute(self, indices: Indices) -> list[Tensor]:
        take_turn()
        return self.teacher(self.inputs(indices))

    def _allocate(self, level: Tensor) -> Tensor:
        shape = (len(self._pixels), *level.shape[1:])
        return torch.empty(shape, dtype=torch.float16, device=level.device, memory_format=torch.channels_last)
