"""Combine the distance maps of a model into one anomaly map and one score, as pure functions.

There is one map for each level of the student and for each memory bank. They are combined by the product of the
student's levels (Wang et al., equation 4), or by a weighted mean of the student and the memory, each of them the mean
of its maps, which are scaled by quantiles of their values on held-out images (EfficientAD: Batzner et al., WACV 2024,
arXiv 2303.14535, section 3.4).

Convention: distance maps are (B, Hₗ, Wₗ), anomaly maps (B, H, W) of the input's shape, all float32. A mask `valid` is
(B, Hₗ, Wₗ) bool, true at valid positions, those not on padding; None: all are valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn.functional import interpolate

from stpm.method.recipe import Recipe
from stpm.method.scales import DistanceScale

Float32Array = npt.NDArray[np.float32]

_EPS = 1e-12
# Sampled distances of an image, minimum and maximum, and of all images: enough for quantiles.
_MIN_SAMPLES, _MAX_SAMPLES, _MAX_TOTAL_SAMPLES = 16, 1024, 256 * 1024


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


def sample_distances(distances: Tensor, valid: Tensor | None = None, total_images: int = 0) -> list[Float32Array]:
    """Sample the distances on each image, evenly spaced over the valid positions.

    Return one array per image, of at most 1,024 distances; if more than 256 images calibrate the model (`total_images`,
    where there are more than B), of fewer, but at least 16.
    """
    images = list(distances.flatten(1).cpu().numpy())
    if valid is not None:
        images = [image[keep] for image, keep in zip(images, valid.flatten(1).cpu().numpy(), strict=True)]
    max_samples = min(_MAX_SAMPLES, _MAX_TOTAL_SAMPLES // max(total_images, len(images), 1))
    max_samples = max(max_samples, _MIN_SAMPLES)
    return [image[np.linspace(0, len(image) - 1, min(len(image), max_samples)).astype(int)] for image in images]


def upsample(distances: Tensor, input_shape: tuple[int, int], valid: Tensor | None = None) -> Tensor:
    """Upsample distance maps of one level or bank bilinearly to the input's shape: (B, Hₗ, Wₗ) to (B, height, width).

    Next to a position that is not `valid` the result has the value of the valid one; far from every valid position it
    is meaningless.
    """
    if valid is None:
        return _resize(distances, input_shape)
    return _resize(distances * valid, input_shape) / _resize(valid.float(), input_shape).clamp_min(_EPS)


@dataclass(frozen=True)
class Score:
    """An image's score, and what the student and the memory add to it; None as in `AnomalyMap`."""

    total: float
    student: float | None
    memory: float | None


@dataclass(frozen=True)
class AnomalyMap:
    """An image's anomaly map, (H, W) float32, and what its parts add to it: `student` + `memory` = `total`.

    The parts' maps are None where the total is a product, or the model has no such part.
    """

    total: Float32Array
    student: Float32Array | None = None
    memory: Float32Array | None = None

    def smoothed(self, sigma: float) -> AnomalyMap:
        """Smooth the map by a Gaussian that is cut off at three standard deviations (pixels); borders are repeated."""
        if not sigma:
            return self
        gaussian = partial(gaussian_filter, sigma=sigma, mode="nearest", truncate=3.0)
        student, memory = (None if part is None else gaussian(part) for part in (self.student, self.memory))
        return AnomalyMap(gaussian(self.total), student, memory)

    def score(self, top_fraction: float) -> Score:
        """Compute the image's score: the mean of the highest pixels, this fraction of them, at least one."""
        total = self.total.ravel()
        count = max(round(top_fraction * total.size), 1)
        top = np.array([total.argmax()]) if count == 1 else np.argpartition(total, -count)[-count:]
        student, memory = (None if part is None else _mean(part, top) for part in (self.student, self.memory))
        return Score(_mean(self.total, top), student, memory)


def fuse(
    distances: Distances,
    scales: Sequence[DistanceScale],
    recipe: Recipe,
    input_shape: tuple[int, int],
    valid: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Combine distance maps by the recipe's fusion: the total, and what student and memory add to it, (B, H, W) each.

    There are a scale and a mask for each of `distances.maps`. Fusion by `product` and `sum` needs no scales, and takes
    no memory; by `quantile`, the student has the recipe's `student_weight`, and the memory the rest.
    """
    maps = list(distances.maps)
    if recipe.fusion == "product":
        levels = [upsample(d, input_shape, v) for d, v in zip(maps, valid, strict=True)]
        return torch.stack(levels).prod(dim=0), None, None
    n = len(distances.student)
    if recipe.fusion == "quantile":
        weights = _map_weights(n, len(distances.memory), recipe.student_weight)
        maps = [(d - s.low) * (w / s.spread) for d, s, w in zip(maps, scales, weights, strict=True)]
    student = _add(maps[:n], valid[:n], input_shape) if distances.student else None
    memory = _add(maps[n:], valid[n:], input_shape) if distances.memory else None
    total = torch.stack([part for part in (student, memory) if part is not None]).sum(dim=0)
    return total, student, memory


def _map_weights(levels: int, banks: int, student_weight: float) -> list[float]:
    """Return the weight of each map, the student's levels first; they add up to 1, also without a student or memory."""
    if not (levels and banks):
        return [1 / (levels + banks)] * (levels + banks)
    return [student_weight / levels] * levels + [(1 - student_weight) / banks] * banks


def _add(maps: Sequence[Tensor], valid: Sequence[Tensor | None], input_shape: tuple[int, int]) -> Tensor:
    """Add distance maps at the input's shape. Maps of one shape have the same mask and are upsampled together."""
    by_shape: dict[torch.Size, tuple[Tensor, Tensor | None]] = {}
    for distances, mask in zip(maps, valid, strict=True):
        sum_so_far, _ = by_shape.get(distances.shape, (0.0, None))
        by_shape[distances.shape] = distances + sum_so_far, mask
    return torch.stack([upsample(d, input_shape, v) for d, v in by_shape.values()]).sum(dim=0)


def _mean(values: Float32Array, indices: npt.NDArray[np.int64]) -> float:
    return float(values.ravel()[indices].mean(dtype=np.float64))


def _resize(maps: Tensor, shape: tuple[int, int]) -> Tensor:
    return interpolate(maps[:, None], size=shape, mode="bilinear", align_corners=False)[:, 0]
