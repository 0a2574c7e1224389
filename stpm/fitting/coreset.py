"""Build a category's memory banks from the teacher's features of its training images."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.train_student import EVALUATION_BATCH, Indices, batches
from stpm.method.forward import spatial_shape
from stpm.method.memory_bank import KINDS, MemoryBank, describe, fit_bank, window_size
from stpm.method.recipe import Recipe

# Descriptors that a coreset is chosen from: more would take longer than a small category's fit.
_CANDIDATES = 65_536


def build_memory(features: TeacherFeatures, train: Indices, recipe: Recipe) -> tuple[MemoryBank, ...]:
    """The memory banks of a model: for each of the recipe's memory levels, one of features and one of directions.

    The same images, recipe and kind of device give the same banks.

    Args:
        features: of the images.
        train: which images to remember; none that are held out.
        recipe: vectors per bank (none: no banks), levels and seed.
    """
    if not recipe.memory:
        return ()
    positions = [recipe.levels.index(level) for level in recipe.memory_levels]
    kinds = [(position, kind) for position in positions for kind in KINDS]
    per_image = math.ceil(_CANDIDATES / len(train))
    coarsest = features.shapes[positions[-1]]
    windows = {position: window_size(features.shapes[position], coarsest) for position in positions}
    candidates: list[list[Tensor]] = [[] for _ in kinds]
    for batch in batches(train, EVALUATION_BATCH):
        indices = torch.from_numpy(batch)
        levels, valid = features(indices), features.content_masks(indices)
        chosen = {p: _chosen(levels[p], valid[p], batch, per_image, recipe.seed) for p in positions}
        for (position, kind), found in zip(kinds, candidates, strict=True):
            described = describe(levels[position], kind, windows[position], valid[position])
            found.append(described.flatten(0, 2)[chosen[position]])
    return tuple(
        fit_bank(torch.cat(found), position, kind, windows[position], recipe.memory, recipe.seed)
        for (position, kind), found in zip(kinds, candidates, strict=True)
    )


def _chosen(level: Tensor, valid: Tensor | None, images: Indices, per_image: int, seed: int) -> Tensor:
    """Flat indices into (B, H, W) of the positions of each image that are candidates, drawn by seed and image."""
    height, width = spatial_shape(level)
    result = []
    for row, image in enumerate(images.tolist()):
        positions = np.arange(height * width) if valid is None else np.flatnonzero(valid[row].cpu().numpy())
        if len(positions) > per_image:
            rng = np.random.default_rng((seed, height, image))
            positions = np.sort(rng.choice(positions, per_image, replace=False))
        result.append(row * height * width + positions)
    return torch.from_numpy(np.concatenate(result)).to(level.device)
