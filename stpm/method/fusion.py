"""From the distance maps of a model's parts to one anomaly map and one score, as pure tensor functions.

A part is one level of the student or one memory bank. Two ways lead to one map: the product of the student's levels
(Wang et al., equation 4), and the mean of all parts after each was brought to one scale by quantiles of its values on
held-out normal images (EfficientAD: Batzner et al., WACV 2024, arXiv 2303.14535, section 3.4).

Convention: distance maps are (B, Hₗ, Wₗ), anomaly maps (B, H, W) at input size, float32 all.
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

from stpm.method.calibration import PartScale
from stpm.method.recipe import Fusion

Map = npt.NDArray[np.float32]

_EPS = 1e-12
# Of the positions of an image, and of all: enough for the quantiles of a part.
_SAMPLED = 1024
_SAMPLED_IN_ALL = 256 * 1024


def part_values(distances: Tensor, valid: Tensor | None = None, images_in_all: int = 0) -> list[Map]:
    """For each image some of a part's distances, evenly spaced over the positions that count.

    1,024 of each image; where there are more than 256 images fewer, 16 at least.

    Args:
        distances: (B, Hₗ, Wₗ).
        valid: (B, Hₗ, Wₗ) bool, the positions that count; None: all.
        images_in_all: how many images calibrate the model, if these are not all.
    """
    images = distances.flatten(1).cpu().numpy()
    if valid is None:
        chosen = list(images)
    else:
        chosen = [row[keep] for row, keep in zip(images, valid.flatten(1).cpu().numpy(), strict=True)]
    most = max(min(_SAMPLED, _SAMPLED_IN_ALL // max(images_in_all, len(images), 1)), 16)
    return [row[np.linspace(0, len(row) - 1, min(len(row), most)).astype(int)] for row in chosen]


def upsample(distances: Tensor, size: tuple[int, int], valid: Tensor | None = None) -> Tensor:
    """Distance maps at input size, bilinearly: (B, Hₗ, Wₗ) to (B, height, width).

    Args:
        distances: of one part.
        size: height and width of the input, pixels.
        valid: (B, Hₗ, Wₗ) bool, the positions that count; None: all. What lies between a position that counts and
            others takes the value of the former; far from any position that counts the result has no meaning.
    """
    if valid is None:
        return _resized(distances, size)
    return _resized(distances * valid, size) / _resized(valid.float(), size).clamp_min(_EPS)


@dataclass(frozen=True)
class AnomalyMap:
    """An image's anomaly map, (H, W) float32, and what its parts add to it: `student` + `memory` = `total`.

    The part's maps are None where the total is a product, or the model has no such part.
    """

    total: Map
    student: Map | None = None
    memory: Map | None = None

    def smoothed(self, sigma: float) -> AnomalyMap:
        """The map smoothed by a Gaussian cut off at three deviations, its borders repeated.

        Args:
            sigma: standard deviation in pixels; 0: as it is.
        """
        if not sigma:
            return self
        gaussian = partial(gaussian_filter, sigma=sigma, mode="nearest", truncate=3.0)
        student, memory = (None if part is None else gaussian(part) for part in (self.student, self.memory))
        return AnomalyMap(gaussian(self.total), student, memory)

    def score(self, top_fraction: float) -> Score:
        """The mean of the highest values.

        Args:
            top_fraction: of the pixels, rounded, at least one pixel.
        """
        total = self.total.ravel()
        count = max(round(top_fraction * total.size), 1)
        top = np.array([total.argmax()]) if count == 1 else np.argpartition(total, -count)[-count:]
        student, memory = (None if part is None else _mean(part, top) for part in (self.student, self.memory))
        return Score(_mean(self.total, top), student, memory)


@dataclass(frozen=True)
class Score:
    """An image's score, and what the student and the memory add to it; None as in `AnomalyMap`."""

    total: float
    student: float | None
    memory: float | None


def fuse(
    student: Sequence[Tensor],
    memory: Sequence[Tensor],
    scales: Sequence[PartScale],
    fusion: Fusion,
    size: tuple[int, int],
    valid: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One map of a model's parts: the total, and the student's and the memory's share of it, (B, H, W) each.

    Args:
        student: distance maps of the student's levels, none if there is no student.
        memory: distance maps of the memory banks; the product and the sum take none.
        scales: of the student's levels, then of the banks; the product and the sum need none.
        fusion: the method; smoothing comes later, when padding is cut off.
        size: height and width of the input, pixels.
        valid: a (B, Hₗ, Wₗ) bool mask of the positions that count for each map, student's first; None: all count.
    """
    maps = [*student, *memory]
    if fusion.method == "product":
        levels = [upsample(d, size, v) for d, v in zip(maps, valid, strict=True)]
        return torch.stack(levels).prod(dim=0), None, None
    if fusion.method == "quantile":
        maps = [(d - s.low) / (s.spread * len(maps)) for d, s in zip(maps, scales, strict=True)]
    of_student, of_memory = (
        _add(maps[part], valid[part], size) if maps[part] else None
        for part in (slice(len(student)), slice(len(student), None))
    )
    total = torch.stack([part for part in (of_student, of_memory) if part is not None]).sum(dim=0)
    return total, of_student, of_memory


def _add(maps: Sequence[Tensor], valid: Sequence[Tensor | None], size: tuple[int, int]) -> Tensor:
    """The sum of distance maps at input size; maps of one shape, whose masks are the same, are upsampled together."""
    by_shape: dict[torch.Size, tuple[Tensor, Tensor | None]] = {}
    for distances, mask in zip(maps, valid, strict=True):
        sum_so_far, _ = by_shape.get(distances.shape, (0.0, None))
        by_shape[distances.shape] = distances + sum_so_far, mask
    return torch.stack([upsample(d, size, v) for d, v in by_shape.values()]).sum(dim=0)


def _mean(values: Map, indices: npt.NDArray[np.int64]) -> float:
    return float(values.ravel()[indices].mean(dtype=np.float64))


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
