"""Combine the distance maps of a model into one anomaly map and one score, as pure functions.

There is one map for each level of the student and for each memory bank. They are combined by the product of the
student's levels (Wang et al., equation 4), or view by view: a weighted mean of the student and the memory, each of them
the mean of its maps, which are scaled by quantiles of their values on held-out images (EfficientAD: Batzner et al.,
WACV 2024, arXiv 2303.14535, section 3.4). The maps of two views are scaled likewise, and combined by a soft maximum: a
defect counts nearly as much as the view that sees it better says.

Convention: distance maps are (B, Hₗ, Wₗ), anomaly maps (B, H, W) of the input's shape, all float32. A mask `valid` is
(B, Hₗ, Wₗ) bool, true at valid positions, those not on padding; None: all are valid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from stpm.method.anomaly_maps import Float32Array
from stpm.method.device import constant, send
from stpm.method.recipe import FusionMethod
from stpm.method.scales import DistanceScale, Floats

_EPS = 1e-12
# Sampled distances of an image, minimum and maximum, and of all images: enough for quantiles.
_MIN_SAMPLES, _MAX_SAMPLES, _MAX_TOTAL_SAMPLES = 16, 1024, 256 * 1024
# Of the soft maximum, in units of the maps; 0 would be the maximum itself.
_SOFTNESS = 0.5
# Above it, what a coarse view adds grows with the logarithm.
_COARSE_KNEE = 2.0


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


def sample_distances(maps: Tensor, valid: Tensor | None = None, total_images: int = 0) -> list[Float32Array]:
    """Sample K maps on each of B images, (K, B, h, w), at the same positions, evenly spaced over the valid ones.

    Return (K, P) values for each image, for at most 1,024 positions; if more than 256 images calibrate the model
    (`total_images`, where there are more than B), for fewer, but at least 16.
    """
    images = list(maps.flatten(2).transpose(0, 1).cpu().numpy())
    if valid is not None:
        images = [image[:, keep] for image, keep in zip(images, valid.flatten(1).cpu().numpy(), strict=True)]
    max_samples = min(_MAX_SAMPLES, _MAX_TOTAL_SAMPLES // max(total_images, len(images), 1))
    max_samples = max(max_samples, _MIN_SAMPLES)
    counts = [image.shape[1] for image in images]
    return [
        image[:, np.linspace(0, count - 1, min(count, max_samples)).astype(int)]
        for image, count in zip(images, counts, strict=True)
    ]


def upsample(distances: Tensor, input_shape: tuple[int, int], valid: Tensor | None = None) -> Tensor:
    """Upsample distance maps of one level or bank bilinearly to the input's shape: (B, Hₗ, Wₗ) to (B, height, width).

    Next to a position that is not `valid` the result has the value of the valid one, one position farther the mean of
    the valid ones there; far from every valid position it is meaningless.
    """
    if valid is None:
        return _resize(distances, input_shape)
    values, weight = distances * valid, valid.float()
    near, near_weight = (avg_pool2d(each[:, None], 3, stride=1, padding=1)[:, 0] for each in (values, weight))
    (values, weight), (near, near_weight) = (
        [_resize(each, input_shape) for each in pair] for pair in ((values, weight), (near, near_weight))
    )
    return torch.where(weight > 0, values / weight.clamp_min(_EPS), near / near_weight.clamp_min(_EPS))


def fuse_levels(
    maps: Sequence[Tensor], valid: Sequence[Tensor | None], method: FusionMethod, shape: tuple[int, int]
) -> Tensor:
    """Combine the maps of a student's levels by their product or sum: (B, H, W) of this shape.

    There is a mask for each map.
    """
    levels = torch.stack([upsample(d, shape, v) for d, v in zip(maps, valid, strict=True)])
    return levels.prod(dim=0) if method == "product" else levels.sum(dim=0)


def on_one_grid(maps: Sequence[Tensor], valid: Sequence[Tensor | None]) -> Tensor:
    """Upsample K maps of B images to the shape of the finest of them: (K, B, h, w). There is a mask for each."""
    shape = max(each.shape[-2] for each in maps), max(each.shape[-1] for each in maps)
    return torch.stack([upsample(each, shape, mask) for each, mask in zip(maps, valid, strict=True)])


def fuse_views(maps: Tensor, weights: Floats, scales: Sequence[DistanceScale]) -> Tensor:
    """Combine K maps, (K, B, h, w), into those of V views, (V, B, h, w), scaled by quantiles.

    Args:
        weights: (V, K), from `map_weights`.
        scales: one for each of the K maps, and then one for each view if there are two.
    """
    low, spread = _columns(scales[: len(maps)], maps)
    views = torch.einsum("vk,kbhw->vbhw", send(torch.from_numpy(weights), maps.device), (maps - low) / spread)
    if len(views) == 1:
        return views
    low, spread = _columns(scales[len(maps) :], maps)
    return (views - low) / spread


def soft_maximum(views: Tensor, coarse_weight: float) -> Tensor:
    """Combine the maps of a fine and a coarse view, (2, …) to (…): t log((1 − w) exp(fine / t) + w exp(coarse / t)).

    Where the coarse map is large, it is wide, and the fine one shows where the defect ends: above 2 the coarse map is
    replaced by 2 + log(coarse − 1). The map of a single view is left as it is.

    >>> soft_maximum(torch.tensor([[1.0, 9.0, 0.0], [1.0, 0.0, 9.0]]), 0.5)
    tensor([1.0000, 8.6534, 3.7330])
    """
    if len(views) == 1:
        return views[0]
    fine, coarse = views
    coarse = torch.minimum(coarse, _COARSE_KNEE + (coarse - _COARSE_KNEE).clamp_min(0.0).log1p())
    fine, coarse = fine / _SOFTNESS + math.log(1 - coarse_weight), coarse / _SOFTNESS + math.log(coarse_weight)
    return torch.logaddexp(fine, coarse) * _SOFTNESS


def map_weights(student: Sequence[int], memory: Sequence[int], student_weight: float) -> Floats:
    """Return the weight of each map in each view, (V, K) float32; those of a view add up to 1.

    `student` and `memory` are the views of their maps. Where a view has both, the student has its weight in all.

    >>> map_weights([1, 1], [0, 1], 0.4)
    array([[0. , 0. , 1. , 0. ],
           [0.2, 0.2, 0. , 0.6]], dtype=float32)
    """
    rows = []
    for view in range(max(*student, *memory, 0) + 1):
        counts = student.count(view), memory.count(view)
        shares = (student_weight, 1 - student_weight) if all(counts) else (1.0, 1.0)
        one, other = (share / max(count, 1) for share, count in zip(shares, counts, strict=True))
        rows.append([one * (of == view) for of in student] + [other * (of == view) for of in memory])
    return np.array(rows, np.float32)


def _columns(scales: Sequence[DistanceScale], maps: Tensor) -> tuple[Tensor, Tensor]:
    values = constant(tuple(number for scale in scales for number in (scale.low, scale.spread)), maps.device)
    low, spread = values.view(-1, 2, 1, 1, 1).unbind(dim=1)
    return low, spread


def _resize(maps: Tensor, shape: tuple[int, int]) -> Tensor:
    return interpolate(maps[:, None], size=shape, mode="bilinear", align_corners=False)[:, 0]
