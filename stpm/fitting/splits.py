"""Split the indices of a category's images: into those to train on and those to hold out, folds, and batches."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stpm.method.recipe import Recipe

Indices = npt.NDArray[np.int64]


def split_images(count: int, recipe: Recipe) -> tuple[Indices, Indices]:
    """Split the indices of `count` images at random into those to train on and those to hold out, both ascending.

    Raises:
        DataError: if there are too few images for the recipe.
    """
    recipe.check_image_count(count)
    order = np.random.default_rng(recipe.seed).permutation(count)
    held_out_count = recipe.held_out_count(count)
    return np.sort(order[held_out_count:]), np.sort(order[:held_out_count])


def split_folds(count: int, recipe: Recipe) -> list[tuple[Indices, Indices]]:
    """Split the indices of `count` images at random into calibration folds of about the same size.

    Returns:
        For each fold, the indices of the images to fit on and those of the fold, both ascending. The images to fit on
        are others, and at most as many as the model is fitted on: from more, a fold's model would score good images
        lower than the model does.
    """
    order = np.random.default_rng(recipe.seed).permutation(count)
    fit_count = count - recipe.held_out_count(count)
    folds = np.array_split(order, recipe.fold_count(count))
    return [(np.sort(order[~np.isin(order, fold)][:fit_count]), np.sort(fold)) for fold in folds]


def split_batches(indices: Indices, size: int) -> list[Indices]:
    """Split indices into batches of `size`; the last one may be smaller."""
    return [indices[i : i + size] for i in range(0, len(indices), size)]
