"""Calibration: images that a student never saw, scored by the code that scoring uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stpm.calibration import Calibration, calibrate
from stpm.errors import DataError
from stpm.fitting.features import TeacherFeatures
from stpm.fitting.loop import EVALUATION_BATCH, Checkpoints, Indices, batches, fit
from stpm.fitting.training_images import TrainingImages
from stpm.forward import Map, Matcher, place, shape_of
from stpm.matching import LevelStatistics, level_statistics, standardised_without_itself
from stpm.networks import StateDict, architecture_of, trunk_from
from stpm.preprocessing import Boxes
from stpm.recipe import LEAST_TO_STANDARDISE, Recipe


def calibrate_student(
    student: StateDict, matcher: Matcher, images: TrainingImages, held_out: Indices, recipe: Recipe
) -> tuple[Calibration, list[LevelStatistics] | None]:
    """Scores and heatmap scale from the held-out images; and the levels' statistics, if the recipe needs them.

    Raises:
        DataError: if they are too few to standardise by.
    """
    distances = _distances(student, matcher, images, held_out, recipe)
    statistics = level_statistics(distances) if recipe.combine == "calibrated" else None
    return calibrate(_maps(distances, images.content[held_out], matcher)), statistics


def cross_fitted(
    features: TeacherFeatures, recipe: Recipe, checkpoints: Sequence[Checkpoints | None]
) -> npt.NDArray[np.float32]:
    """One score for every image, from students that were fitted without it: ascending, of length N.

    Each fold's student runs all epochs and keeps the last, so that no choice is made on the fold that it scores.

    Args:
        features: the images and their features.
        recipe: with the number of folds.
        checkpoints: where each fold's fit keeps its progress.
    """
    images, matcher = features.images, features.matcher
    order = np.random.default_rng(recipe.seed).permutation(len(images))
    folds = [np.sort(fold) for fold in np.array_split(order, recipe.calibration_folds)]
    without_choice = dataclasses.replace(recipe, keep="last", early_stopping=0)
    scores: list[np.float32] = []
    for fold, kept in zip(folds, checkpoints, strict=True):
        rest = np.setdiff1d(order, fold)
        fitted = fit(features, rest, fold, without_choice, lambda epoch: None, kept)
        distances = _distances(fitted.student, matcher, images, fold, recipe)
        scores += [each.max() for each in _maps(distances, images.content[fold], matcher)]
    return np.sort(np.array(scores, np.float32))


def _distances(
    weights: StateDict, matcher: Matcher, images: TrainingImages, indices: Indices, recipe: Recipe
) -> list[Tensor]:
    """Distances of each level, those on padding replaced where the levels are standardised by their statistics."""
    student = trunk_from(architecture_of(recipe.teacher), recipe.levels, weights, "fitted student")
    place(student, matcher.device)
    parts = [matcher.distances(student, images.pixels[chosen]) for chosen in batches(indices, EVALUATION_BATCH)]
    levels = [torch.cat(level) for level in zip(*parts, strict=True)]
    masks = matcher.content_masks(images.content[indices], [shape_of(level) for level in levels])
    if matcher.combine != "calibrated" or masks is None:
        return levels
    # A position that some images leave empty is taken to be like the others of its level there.
    return [torch.where(mask, level, level[mask].mean()) for level, mask in zip(levels, masks, strict=True)]


def _maps(distances: list[Tensor], content: Boxes, matcher: Matcher) -> list[Map]:
    if matcher.combine == "calibrated":
        if len(distances[0]) < LEAST_TO_STANDARDISE:
            raise DataError(
                f"{len(distances[0])} held-out images; combine `calibrated` needs {LEAST_TO_STANDARDISE}: add images, "
                "raise --validation-share, or choose another --combine"
            )
        distances = standardised_without_itself(distances)
    return matcher.anomaly_maps(distances, content, None)
