"""The loss of student-teacher feature pyramid matching, as tensor functions (Wang et al., BMVC 2021, arXiv 2103.04257).

Convention: features are (B, C, H, W), one tensor per pyramid level, finest first. Distance maps are (B, H, W) float32,
from 0 (same direction) to 2 (opposite). In all of this project, larger means more anomalous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_EPS = 1e-12


def distance_map(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute half the squared distance between features that are normalised over channels (equations 1 and 2).

    ½‖t̂ − ŝ‖² = ½(‖t̂‖² + ‖ŝ‖²) − ⟨t, s⟩ / (‖t‖‖s‖) takes three reductions and no normalised copy. The squared norm
    of a normalised vector is 1, or 0 where the feature vector itself is zero (shorter than 1e-12).

    Both are (B, C, H, W) features of any float type, reduced in float32 to (B, H, W) in [0, 2]. Other shapes raise
    ValueError.

    One channel pair per position, in the same, an orthogonal and the opposite direction:

    >>> teacher = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]).view(1, 2, 1, 3)
    >>> student = torch.tensor([[5.0, 0.0, -1.0], [0.0, 2.0, 0.0]]).view(1, 2, 1, 3)
    >>> distance_map(teacher, student)
    tensor([[[0., 1., 2.]]])
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


def matching_loss(teacher: Sequence[Tensor], student: Sequence[Tensor], valid: Sequence[Tensor | None]) -> Tensor:
    """Average the distances over positions, images and levels (equations 2 and 3): a scalar in [0, 2].

    Args:
        teacher: features, one (B, Cₗ, Hₗ, Wₗ) tensor per level.
        student: features of the same shapes.
        valid: one (B, Hₗ, Wₗ) bool mask per level, true at valid positions, those not on padding; None: all are valid.
            Each image has at least one, and the same weight, however many it has.
    """
    distances = [distance_map(t, s) for t, s in zip(teacher, student, strict=True)]
    return torch.stack([_mean(d, v) for d, v in zip(distances, valid, strict=True)]).mean()


def _mean(distances: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return distances.mean()
    return ((distances * valid).sum(dim=(1, 2)) / valid.sum(dim=(1, 2))).mean()
