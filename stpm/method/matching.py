"""Student-teacher feature pyramid matching as pure tensor functions (Wang et al., BMVC 2021, arXiv 2103.04257).

Convention: features are (B, C, H, W), one tensor per pyramid level, finest first. Distance maps are (B, H, W) float32,
from 0 (same direction) to 2 (opposite). In all of this project, larger means more anomalous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

_EPS = 1e-12


def distance_map(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute half the squared distance between features that are normalised over channels (equations 1 and 2).

    ½‖t̂ − ŝ‖² = ½(‖t̂‖² + ‖ŝ‖²) − ⟨t, s⟩ / (‖t‖‖s‖) takes three reductions and no normalised copy. The squared norm
    of a normalised vector is 1, or 0 where the feature vector itself is zero (shorter than 1e-12).

    Args:
        teacher: (B, C, H, W) features, any float type; reductions are made in float32.
        student: features of the same shape.

    Returns:
        (B, H, W) float32 in [0, 2].

    Raises:
        ValueError: if the shapes differ.

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


def content_mask(content: Tensor, input_shape: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Mark the positions of a pyramid level whose centre lies on the image and not on the padding around it.

    Where an image is too narrow to hold any centre, the position that holds the image's middle is marked.

    Args:
        content: (B, 4) integers: left, top, right and bottom of each image within the input, pixels.
        input_shape: height and width of the input, pixels.
        shape: height and width of the level.

    Returns:
        (B, H, W) bool, true for at least one position of each image.

    An image in the right half of an input of 8 x 8 pixels, at a level of 2 x 4 positions:

    >>> content_mask(torch.tensor([[4, 0, 8, 8]]), (8, 8), (2, 4)).int()
    tensor([[[0, 0, 1, 1],
             [0, 0, 1, 1]]], dtype=torch.int32)
    """
    left, top, right, bottom = content.long().unbind(dim=1)
    rows, columns = _inside(top, bottom, input_shape[0], shape[0]), _inside(left, right, input_shape[1], shape[1])
    return rows[:, :, None] & columns[:, None, :]


def _inside(start: Tensor, stop: Tensor, length: int, positions: int) -> Tensor:
    """Mark the positions in each span [start, stop) of an axis of `length` pixels: (B, positions) bool."""
    centres = (torch.arange(positions, device=start.device) + 0.5) * length / positions
    inside = (start[:, None] <= centres) & (centres < stop[:, None])
    middle = (start + stop) * positions // (2 * length)
    return torch.where(inside.any(dim=1, keepdim=True), inside, one_hot(middle, positions).bool())
