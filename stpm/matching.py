"""Student-teacher feature pyramid matching as pure tensor functions (Wang et al., BMVC 2021, arXiv 2103.04257).

Convention: features are (B, C, H, W), one tensor per pyramid level, finest first; distance maps are (B, H, W)
float32, from 0 (same direction) to 2 (opposite). Larger means more anomalous everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Combine = Literal["product", "sum"]
COMBINES: tuple[Combine, ...] = ("product", "sum")

_EPS = 1e-12


def distance_map(teacher: Tensor, student: Tensor) -> Tensor:
    """Half the squared distance between the features, each normalised over channels (equations 1 and 2).

    ½‖t̂ − ŝ‖² = ½(‖t̂‖² + ‖ŝ‖²) − ⟨t, s⟩ / (‖t‖‖s‖): three reductions instead of two normalised copies. The
    squared norm of a normalised vector is 1, or 0 where the feature vector itself is zero.

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


def anomaly_map(distances: Sequence[Tensor], size: int, combine: Combine = "product") -> Tensor:
    """Combine the levels' distance maps at input size (equation 4).

    Args:
        distances: one (B, Hₗ, Wₗ) map per level.
        size: height and width of the result, in pixels; maps are upsampled bilinearly.
        combine: `product` as in the paper, or `sum`.

    Returns:
        (B, size, size) float32: up to 2ᴸ for a product of L levels, up to 2L for a sum.
    """
    upsampled = torch.stack(
        [interpolate(d[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0] for d in distances]
    )
    return upsampled.prod(dim=0) if combine == "product" else upsampled.sum(dim=0)


def image_score(anomaly_maps: Tensor) -> Tensor:
    """An image's score is the maximum of its map: (B, H, W) to (B,)."""
    return anomaly_maps.flatten(1).amax(dim=1)
