"""Build a category's memory banks from the teacher's features of its training images."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from stpm.fitting.teacher_features import EVALUATION_BATCH_SIZE, Indices, TeacherFeatures, split_batches
from stpm.method.forward import spatial_shape
from stpm.method.memory_bank import KINDS, MemoryBank, describe, fit_bank, window_size
from stpm.method.recipe import Recipe

# Descriptors to choose a bank's coreset from. With more, this takes longer than a small student's training.
_MAX_CANDIDATES = 65_536


def build_memory(features: TeacherFeatures, train: Indices, recipe: Recipe) -> tuple[MemoryBank, ...]:
    """Build two banks for each of the recipe's memory levels: one of features and one of directions.

    The same training images, recipe and kind of device give the same banks.
    """
    if not recipe.memory:
        return ()
    level_indices = [recipe.levels.index(level) for level in recipe.memory_levels]
    banks = [(index, kind) for index in level_indices for kind in KINDS]
    per_image = math.ceil(_MAX_CANDIDATES / len(train))
    coarsest = features.shapes[level_indices[-1]]
    windows = {index: window_size(features.shapes[index], coarsest) for index in level_indices}
    candidates: list[list[Tensor]] = [[] for _ in banks]
    for batch in split_batches(train, EVALUATION_BATCH_SIZE):
        levels, valid = features(batch), features.content_masks(batch)
        chosen = {i: _choose_candidates(levels[i], valid[i], batch, per_image, recipe.seed) for i in level_indices}
        for (index, kind), found in zip(banks, candidates, strict=True):
            descriptors = describe(levels[index], kind, windows[index], valid[index])
            found.append(descriptors.flatten(0, 2)[chosen[index]])
    return tuple(
        fit_bank(torch.cat(found), index, kind, windows[index], recipe.memory, recipe.seed)
        for (index, kind), found in zip(banks, candidates, strict=True)
    )


def _choose_candidates(level: Tensor, valid: Tensor | None, images: Indices, per_image: int, seed: int) -> Tensor:
    """Choose up to `per_image` positions of each image at random; return flat indices into (B, H, W)."""
    height, width = spatial_shape(level)
    chosen = []
    for row, image in enumerate(images.tolist()):
        positions = np.arange(height * width) if valid is None else np.flatnonzero(valid[row].cpu().numpy())
        if len(positions) > per_image:
            rng = np.random.default_rng((seed, height, image))
            positions = np.sort(rng.choice(positions, per_image, replace=False))
        chosen.append(row * height * width + positions)
    return torch.from_numpy(np.concatenate(chosen)).to(level.device)
