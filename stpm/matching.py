"""Student-teacher feature pyramid matching as pure tensor functions (Wang et al., BMVC 2021, arXiv 2103.04257).

Convention: features are (B, C, H, W), one tensor per pyramid level, finest first; distance maps are (B, H, W)
float32, from 0 (same direction) to 2 (opposite). Larger means more anomalous everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate, one_hot

from stpm.recipe import Combine

_EPS = 1e-12
# Of a level's mean deviation: keeps a position that hardly varied among few images from drowning all others.
_FLOOR = 0.5


@dataclass(frozen=True)
class LevelStatistics:
    """Mean and deviation over normal images of one level's distance at each position, (H, W) float32 both."""

    mean: Tensor
    deviation: Tensor

    def to(self, device: torch.device) -> LevelStatistics:
        return LevelStatistics(self.mean.to(device), self.deviation.to(device))


def distance_map(teacher: Tensor, student: Tensor) -> Tensor:
    """Half the squared distance between the features, each normalised over channels (equations 1 and 2).

    ½‖t̂ − ŝ‖² = ½(‖t̂‖² + ‖ŝ‖²) − ⟨t, s⟩ / (‖t‖‖s‖): three reductions instead of two normalised copies. The
    squared norm of a normalised vector is 1, or 0 where the feature vector itself is zero (shorter than 1e-12).

    Args:
        teacher: (B, C, H, W), any float type; reductions are made in float32.
        student: the same shape.

    Returns:
        (B, H, W) float32 in [0, 2].

    Raises:
        ValueError: if the shapes differ.
    """
    if teacher.shape != student.shape:
        raise ValueError(f"teacher {tuple(teacher.shape)} and student {tuple(student.shape)} differ in shape")
    teacher, student = teacher.float(), student.float()
    dot = (teacher * student).sum(dim=1)
    t_norm = torch.linalg.vector_norm(teacher, dim=1)
    s_norm = torch.linalg.vector_norm(student, dim=1)
    squares = (t_norm > _EPS).float() + (s_norm > _EPS).float()
    cosine = dot / (t_norm * s_norm).clamp_min(_EPS)
    return torch.clamp(squares / 2 - cosine, 0.0, 2.0)


def matching_loss(
    teacher: Sequence[Tensor], student: Sequence[Tensor], valid: Sequence[Tensor] | None = None
) -> Tensor:
    """Mean distance over positions and images, averaged over levels (equations 2 and 3): a scalar in [0, 2].

    Args:
        teacher: features, one (B, Cₗ, Hₗ, Wₗ) tensor per level.
        student: features of the same shapes.
        valid: one (B, Hₗ, Wₗ) bool mask per level of the positions that count, at least one in each image; None: all.
            Images weigh the same, however many of their positions count.
    """
    distances = [distance_map(t, s) for t, s in zip(teacher, student, strict=True)]
    if valid is None:
        return torch.stack([d.mean() for d in distances]).mean()
    means = [(d * v).sum(dim=(1, 2)) / v.sum(dim=(1, 2)) for d, v in zip(distances, valid, strict=True)]
    return torch.stack([mean.mean() for mean in means]).mean()


def content_mask(content: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Which positions of a pyramid level lie on the image, and not on the padding around it.

    Those whose centre does. Where an image is too narrow to hold any centre, it is the position that holds its middle.

    Args:
        content: (B, 4) integers: left, top, right and bottom of each image within the input, pixels.
        size: height and width of the input, pixels.
        shape: height and width of the level.

    Returns:
        (B, H, W) bool, at least one of them true for each image.
    """
    left, top, right, bottom = content.long().unbind(dim=1)
    rows, columns = _inside(top, bottom, size[0], shape[0]), _inside(left, right, size[1], shape[1])
    return rows[:, :, None] & columns[:, None, :]


def _inside(start: Tensor, stop: Tensor, size: int, positions: int) -> Tensor:
    """Of each span [start, stop) of an axis of `size` pixels, the positions in it: (B, positions) bool."""
    centres = (torch.arange(positions, device=start.device) + 0.5) * size / positions
    inside = (start[:, None] <= centres) & (centres < stop[:, None])
    middle = (start + stop) * positions // (2 * size)
    return torch.where(inside.any(dim=1, keepdim=True), inside, one_hot(middle, positions).bool())


def level_statistics(distances: Sequence[Tensor]) -> list[LevelStatistics]:
    """From one (N, Hₗ, Wₗ) map per level of N ≥ 2 normal images to their statistics per position."""
    return [LevelStatistics(d.mean(dim=0), _floored(d.var(dim=0))) for d in distances]


def standardised(distances: Sequence[Tensor], statistics: Sequence[LevelStatistics]) -> list[Tensor]:
    """How many deviations above the mean of normal images each distance lies: maps of the same shapes."""
    return [(d - s.mean) / s.deviation for d, s in zip(distances, statistics, strict=True)]


def standardised_without_itself(distances: Sequence[Tensor]) -> list[Tensor]:
    """Each of N ≥ 3 normal images standardised by the statistics of the other N − 1.

    An image that had a part in its own mean and deviation would look more normal than any image that comes later.
    """
    result = []
    for d in distances:
        n = len(d)
        mean = (d.sum(dim=0) - d) / (n - 1)
        squares = (d.square().sum(dim=0) - d.square()) / (n - 1)
        variance = (squares - mean.square()).clamp_min(0.0) * (n - 1) / (n - 2)
        result.append((d - mean) / torch.stack([_floored(v) for v in variance]))
    return result


def _floored(variance: Tensor) -> Tensor:
    floor = _FLOOR * variance.mean().sqrt()
    return (variance + floor.square() + _EPS).sqrt()


def anomaly_map(
    distances: Sequence[Tensor],
    height: int,
    width: int,
    combine: Combine = "product",
    valid: Sequence[Tensor] | None = None,
) -> Tensor:
    """Combine the levels' distance maps at input size (equation 4).

    Args:
        distances: one (B, Hₗ, Wₗ) map per level; for `calibrated`, standardised ones.
        height: of the result, in pixels; maps are upsampled bilinearly.
        width: of the result, in pixels.
        combine: `product` as in the paper; `sum` and `calibrated` add.
        valid: one (B, Hₗ, Wₗ) bool mask per level of the positions that count; None: all. What is interpolated between
            a position that counts and others takes the value of the former.

    Returns:
        (B, height, width) float32: up to 2ᴸ for a product of L levels, up to 2L for a sum, unbounded if calibrated.
        Far from any position that counts it has no meaning.
    """
    if valid is None:
        levels = [_upsampled(d, height, width) for d in distances]
    else:
        levels = [
            _upsampled(d * v, height, width) / _upsampled(v.float(), height, width).clamp_min(_EPS)
            for d, v in zip(distances, valid, strict=True)
        ]
    stacked = torch.stack(levels)
    return stacked.prod(dim=0) if combine == "product" else stacked.sum(dim=0)


def _upsampled(maps: Tensor, height: int, width: int) -> Tensor:
    return interpolate(maps[:, None], size=(height, width), mode="bilinear", align_corners=False)[:, 0]


def image_score(anomaly_maps: Tensor) -> Tensor:
    """An image's score is the maximum of its map: (B, H, W) to (B,)."""
    return anomaly_maps.flatten(1).amax(dim=1)
