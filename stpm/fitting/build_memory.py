"""Build a category's memory banks from the teacher's features of its training images."""

from __future__ import annotations

import itertools
import math
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stpm.fitting.splits import Indices
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.turns import take_turn
from stpm.method.memory_bank import (
    KINDS,
    DescriptorSpec,
    MemoryBank,
    fit_bank,
    grid_positions,
    stride_of,
    strided_shape,
    window_size,
)
from stpm.method.recipe import Recipe
from stpm.method.views import choose_memory_levels

# Descriptors to choose a bank's coreset from. With more, this takes longer than a small student's training.
_MAX_CANDIDATES = 65_536


class MemoryCandidates:
    """Descriptors of a category's images, among which the coresets of its memory banks are chosen.

    There are two banks for each memory level of each view: one of features and one of directions. The same images,
    recipe and kind of device give the same banks.
    """

    def __init__(self, features: TeacherFeatures, images: Indices, recipe: Recipe) -> None:
        self._recipe = recipe
        self._specs = _make_specs(features, recipe) if recipe.memory else []
        shapes = {
            spec.level_index: strided_shape(features.shapes[spec.level_index], spec.stride) for spec in self._specs
        }
        first_coarse = len(features.teacher.views[0].levels)
        lamps = (0.0, recipe.brightness) if recipe.brightness else (0.0,)
        per_image = math.ceil(_MAX_CANDIDATES / len(images) / len(lamps))
        descriptors: list[list[Tensor]] = [[] for _ in self._specs]
        origins: list[list[Tensor]] = [[] for _ in self._specs]
        positions: list[list[Tensor]] = [[] for _ in self._specs]
        for batch, lamp in itertools.product(features.batches(images), lamps) if self._specs else ():
            levels = features.brightened(batch, _factors(batch, lamp, recipe.seed)) if lamp else features(batch)
            valid = features.content_masks(batch)
            strided_valid = features.teacher.content_masks(features.images.content[batch], list(shapes.values()))
            chosen = {
                index: _choose_candidates(shape, mask, batch, per_image, recipe.seed)
                for (index, shape), mask in zip(shapes.items(), strided_valid, strict=True)
            }
            for spec, found, origin, position in zip(self._specs, descriptors, origins, positions, strict=True):
                index = spec.level_index
                described = spec.describe(levels[index], valid[index])
                places = chosen[index].to(described.device)
                found.append(described.flatten(0, 2)[places])
                count = math.prod(shapes[index])
                origin.append(torch.from_numpy(batch)[chosen[index] // count])
                if index >= first_coarse:
                    position.append(grid_positions(shapes[index], places.device)[places % count])
        self._descriptors = [torch.cat(found) for found in descriptors]
        self._images = [torch.cat(origin) for origin in origins]
        self._positions = [torch.cat(position) if position else None for position in positions]

    @cached_property
    def _fitted(self) -> list[tuple[MemoryBank, Tensor]]:
        fitted = []
        for found, spec, positions in zip(self._descriptors, self._specs, self._positions, strict=True):
            take_turn()
            fitted.append(fit_bank(found, spec, self._recipe.memory, self._recipe.seed, positions=positions))
        return fitted

    @property
    def banks(self) -> tuple[MemoryBank, ...]:
        """Return the banks of all images; none if the recipe has no memory."""
        return tuple(bank for bank, _ in self._fitted)

    def banks_without(self, images: Indices) -> tuple[MemoryBank, ...]:
        """Return the banks of all images but these.

        Only these images' vectors in a coreset are chosen anew: it takes a fraction of the time, and
        bench/RESULTS-quality.md shows that held-out images score as with banks that never saw them.
        """
        banks = []
        for found, origin, positions, spec, (_, chosen) in zip(
            self._descriptors, self._images, self._positions, self._specs, self._fitted, strict=True
        ):
            take_turn()
            keep = (~torch.isin(origin, torch.from_numpy(images))).to(found.device)
            start = (keep.cumsum(0) - 1)[chosen[keep[chosen]]]
            kept = None if positions is None else positions[keep]
            bank, _ = fit_bank(found[keep], spec, self._recipe.memory, self._recipe.seed, start, kept)
            banks.append(bank)
        return tuple(banks)


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
