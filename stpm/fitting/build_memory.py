"""Build a category's memory banks from the teacher's features of its training images."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stpm.fitting.splits import Indices
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.method.memory_bank import KINDS, DescriptorSpec, MemoryBank, fit_bank, stride_of, strided_shape, window_size
from stpm.method.recipe import Recipe
from stpm.method.views import choose_memory_levels

# Descriptors to choose a bank's coreset from. With more, this takes longer than a small student's training.
_MAX_CANDIDATES = 65_536


def build_memory(features: TeacherFeatures, train: Indices, recipe: Recipe) -> tuple[MemoryBank, ...]:
    """Build two banks for each memory level of each view: one of features and one of directions.

    The same training images, recipe and kind of device give the same banks.
    """
    if not recipe.memory:
        return ()
    specs = _make_specs(features, recipe)
    shapes = {spec.level_index: strided_shape(features.shapes[spec.level_index], spec.stride) for spec in specs}
    lamps = (0.0, recipe.brightness) if recipe.brightness else (0.0,)
    per_image = math.ceil(_MAX_CANDIDATES / len(train) / len(lamps))
    candidates: list[list[Tensor]] = [[] for _ in specs]
    for batch, lamp in itertools.product(features.batches(train), lamps):
        levels = features.brightened(batch, _factors(batch, lamp, recipe.seed)) if lamp else features(batch)
        valid = features.content_masks(batch)
        strided_valid = features.teacher.content_masks(features.images.content[batch], list(shapes.values()))
        chosen = {
            index: _choose_candidates(shape, mask, batch, per_image, recipe.seed).to(levels[index].device)
            for (index, shape), mask in zip(shapes.items(), strided_valid, strict=True)
        }
        for spec, found in zip(specs, candidates, strict=True):
            descriptors = spec.describe(levels[spec.level_index], valid[spec.level_index])
            found.append(descriptors.flatten(0, 2)[chosen[spec.level_index]])
    return tuple(
        fit_bank(torch.cat(found), spec, recipe.memory, recipe.seed)
        for spec, found in zip(specs, candidates, strict=True)
    )


def _make_specs(features: TeacherFeatures, recipe: Recipe) -> list[DescriptorSpec]:
    """Specify the descriptors of each bank: both kinds for each memory level of each view."""
    specs = []
    first = 0
    # A small image has no coarse view.
    for view, levels in zip(features.teacher.views, choose_memory_levels(recipe), strict=False):
        shapes = dict(zip(view.levels, features.shapes[first:], strict=False))
        for level in levels:
            stride = stride_of(shapes[level], view.input_shape)
            window = window_size(shapes[level], shapes[levels[-1]], stride)
            index = first + view.levels.index(level)
            specs += [DescriptorSpec(index, kind, window, stride) for kind in KINDS]
        first += len(view.levels)
    return specs


def _factors(images: Indices, brightness: float, seed: int) -> npt.NDArray[np.float32]:
    """Draw the brightness of each image, around 1."""
    drawn = [np.random.default_rng((seed, image)).uniform(1 - brightness, 1 + brightness) for image in images.tolist()]
    return np.array(drawn, np.float32)


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
