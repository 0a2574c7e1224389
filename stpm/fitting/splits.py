"""Split a category's images, by index: into those to train on and those to hold out, into folds, and into batches.

Images of one group, such as pictures of one part, are always on the same side.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stpm.errors import DataError
from stpm.method.recipe import Recipe

Indices = npt.NDArray[np.int64]


def split_images(groups: Indices, recipe: Recipe) -> tuple[Indices, Indices]:
    """Split images at random into those to train on and those to hold out, by index, both ascending.

    There is one image to train on or more; `groups` has the number of each image's group.

    Raises:
        DataError: if there are too few images for the recipe.
    """
    count = len(groups)
    recipe.check_image_count(count)
    parts, wanted = _shuffle(groups, recipe), recipe.held_out_count(count)
    least, most = min(wanted, 2), max(wanted, count // 2)
    held_out: list[int] = []
    for part in parts:
        if len(held_out) < wanted and len(held_out) + len(part) <= most:
            held_out += part.tolist()
    if len(held_out) < least:
        held_out = min((part.tolist() for part in parts if least <= len(part) <= most), key=len, default=held_out)
    if len(held_out) < least:
        raise DataError(
            f"the {len(parts)} groups of good images leave only {len(held_out)} image to hold out; give more"
        )
    return np.setdiff1d(np.arange(count), held_out), np.array(sorted(held_out), np.int64)


def split_folds(groups: Indices, recipe: Recipe) -> list[Indices]:
    """Split images at random into two or more calibration folds of about the same size, of whole groups, ascending."""
    parts = _shuffle(groups, recipe)
    starts = np.cumsum([0, *map(len, parts[:-1])])
    numbers = starts * recipe.fold_count(len(groups)) // len(groups)
    if not numbers.any():
        # The last group begins in the first fold.
        numbers = starts > 0
    folds: dict[int, list[Indices]] = {}
    for number, part in zip(numbers.tolist(), parts, strict=True):
        folds.setdefault(number, []).append(part)
    return [np.sort(np.concatenate(fold)) for fold in folds.values()]


def split_batches(indices: Indices, size: int) -> list[Indices]:
    """Split indices into batches of `size`; the last one may be smaller."""
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def _shuffle(groups: Indices, recipe: Recipe) -> list[Indices]:
    """Return the images of each group, the groups in random order."""
    _, numbers = np.unique(groups, return_inverse=True)
    order = np.random.default_rng(recipe.seed).permutation(numbers.max() + 1)
    by_group = np.split(np.argsort(numbers, kind="stable"), np.cumsum(np.bincount(numbers))[:-1])
    return [by_group[number] for number in order]
