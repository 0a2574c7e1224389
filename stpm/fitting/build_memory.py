"""Build a category's memory banks from the teacher's features of its training images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stpm.fitting.teacher_features import EVALUATION_BATCH_SIZE, Indices, TeacherFeatures, split_batches
from stpm.method.memory_bank import KINDS, MemoryBank, describe, fit_bank, stride_of, strided_shape, window_size
from stpm.method.recipe import Recipe

# Descriptors to choose a bank's coreset from. With more, this takes longer than a small student's training.
_MAX_CANDIDATES = 65_536
# Channels of a level that has banks without being asked for. With 24, a level's banks detected worse than none
# (docs/recipes.md).
_MIN_CHANNELS = 32


def build_memory(features: TeacherFeatures, train: Indices, recipe: Recipe) -> tuple[MemoryBank, ...]:
    """Build two banks for each of the recipe's memory levels: one of features and one of directions.

    The same training images, recipe and kind of device give the same banks.
    """
    if not recipe.memory:
        return ()
    level_indices = choose_levels(recipe, features.channels)
    banks = [(index, kind) for index in level_indices for kind in KINDS]
    per_image = math.ceil(_MAX_CANDIDATES / len(train))
    input_shape = features.matcher.preprocessing.input_shape
    coarsest = features.shapes[level_indices[-1]]
    strides = {index: stride_of(features.shapes[index], input_shape) for index in level_indices}
    windows = {index: window_size(features.shapes[index], coarsest, strides[index]) for index in level_indices}
    shapes = {index: strided_shape(features.shapes[index], strides[index]) for index in level_indices}
    candidates: list[list[Tensor]] = [[] for _ in banks]
    for batch in split_batches(train, EVALUATION_BATCH_SIZE):
        levels, valid = features(batch), features.content_masks(batch)
        strided_valid = features.matcher.content_masks(features.images.content[batch], list(shapes.values()))
        chosen = {
            index: _choose_candidates(shapes[index], mask, batch, per_image, recipe.seed).to(levels[index].device)
            for index, mask in zip(level_indices, strided_valid, strict=True)
        }
        for (index, kind), found in zip(banks, candidates, strict=True):
            descriptors = describe(levels[index], kind, windows[index], strides[index], valid[index])
            found.append(descriptors.flatten(0, 2)[chosen[index]])
    return tuple(
        fit_bank(torch.cat(found), index, kind, windows[index], strides[index], recipe.memory, recipe.seed)
        for (index, kind), found in zip(banks, candidates, strict=True)
    )


def choose_levels(recipe: Recipe, channels: Sequence[int]) -> list[int]:
    """Return the indices of the levels with memory banks: the recipe's, or those with enough channels.

    Args:
        recipe: its levels and memory levels are used.
        channels: of each of its levels.
    """
    if recipe.memory_levels:
        return [recipe.levels.index(level) for level in recipe.memory_levels]
    wide = [index for index, count in enumerate(channels) if count >= _MIN_CHANNELS]
    return wide or [len(channels) - 1]


def _choose_candidates(
    shape: tuple[int, int], valid: Tensor | None, images: Indices, per_image: int, seed: int
) -> Tensor:
    """Choose up to `per_image` positions of each image at random; return flat indices into (B, H, W)."""
    height, width = shape
    chosen = []
    for row, image in enumerate(images.tolist()):
        positions = np.arange(height * width) if valid is None else np.flatnonzero(valid[row].cpu().numpy())
        if len(positions) > per_image:
            rng = np.random.default_rng((seed, height, image))
            positions = np.sort(rng.choice(positions, per_image, replace=False))
        chosen.append(row * height * width + positions)
    return torch.from_numpy(np.concatenate(chosen))
