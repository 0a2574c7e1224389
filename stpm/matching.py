"""Student-teacher feature pyramid matching as pure tensor functions (Wang et al., BMVC 2021, arXiv 2103.04257).

Convention: features are (B, C, H, W), one tensor per pyramid level, finest first; distance maps are (B, H, W)
float32, from 0 (same direction) to 2 (opposite). Larger means more anomalous everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

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


def matching_loss(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """Mean distance over positions and images, averaged over levels (equations 2 and 3): a scalar in [0, 2]."""
    return torch.stack([distance_map(t, s).mean() for t, s in zip(teacher, student, strict=True)]).mean()


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


def anomaly_map(distances: Sequence[Tensor], size: int, combine: Combine = "product") -> Tensor:
    """Combine the levels' distance maps at input size (equation 4).

    Args:
        distances: one (B, Hₗ, Wₗ) map per level; for `calibrated`, standardised ones.
        size: height and width of the result, in pixels; maps are upsampled bilinearly.
        combine: `product` as in the paper; `sum` and `calibrated` add.

    Returns:
        (B, size, size) float32: up to 2ᴸ for a product of L levels, up to 2L for a sum, unbounded if calibrated.
    """
    upsampled = torch.stack(
        [interpolate(d[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0] for d in distances]
    )
    return upsampled.prod(dim=0) if combine == "product" else upsampled.sum(dim=0)


def image_score(anomaly_maps: Tensor) -> Tensor:
    """An image's score is the maximum of its map: (B, H, W) to (B,)."""
    return anomaly_maps.flatten(1).amax(dim=1)
