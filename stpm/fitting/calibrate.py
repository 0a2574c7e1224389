"""Calibration: images that no part of a model has seen, scored by the code that scoring uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from stpm.calibration import Calibration, PartScale, calibrate, part_scale, part_scales_without_each
from stpm.fitting.features import TeacherFeatures
from stpm.fitting.loop import EVALUATION_BATCH, Checkpoints, Indices, batches, fit
from stpm.fitting.memory import build_memory
from stpm.forward import Distances, Matcher, Parts, shape_of, to_device
from stpm.fusion import AnomalyMap, part_values
from stpm.memory import MemoryBank
from stpm.networks import StateDict, architecture_of, trunk_from
from stpm.preprocessing import Boxes
from stpm.recipe import Recipe


@dataclass(frozen=True)
class Calibrated:
    """What held-out normals say of a model: `scales` of its parts, in the order of `Distances.maps`."""

    calibration: Calibration
    scales: tuple[PartScale, ...]


def make_parts(student: StateDict | None, memory: Sequence[MemoryBank], recipe: Recipe, device: torch.device) -> Parts:
    """The parts of a fitted model, ready to score on a device."""
    trunk = None
    if student is not None:
        trunk = trunk_from(architecture_of(recipe.teacher), recipe.levels, student, "fitted student")
        trunk = to_device(trunk, device)
    return Parts(trunk, tuple(memory))


def calibrate_model(parts: Parts, features: TeacherFeatures, held_out: Indices, recipe: Recipe) -> Calibrated:
    """Scales, scores and heatmap scale from the held-out images.

    Args:
        parts: of the model.
        features: of the images.
        held_out: which images to use; none that the parts were fitted on.
        recipe: how the parts' distances are fused.
    """
    maps, values = _held_out_maps(parts, features, held_out, recipe)
    scores = [each.score(recipe.top_fraction).total for each in maps]
    return Calibrated(calibrate(scores, [each.total for each in maps]), tuple(map(part_scale, values)))


def k_fold_scores(
    features: TeacherFeatures, recipe: Recipe, checkpoints: Sequence[Checkpoints | None]
) -> npt.NDArray[np.float32]:
    """One score for every image, from models that were fitted without it: ascending, of length N.

    Each fold's student runs all epochs and keeps the last, so that no choice is made on the fold that it scores. There
    are no more folds than leave two images in each: alone, an image would have to give its own scale.

    Args:
        features: the images and their features.
        recipe: with the number of folds.
        checkpoints: where each fold's fit keeps its progress.
    """
    total = len(features.images)
    order = np.random.default_rng(recipe.seed).permutation(total)
    count = min(recipe.calibration_folds, max(total // 2, 2))
    folds = [np.sort(fold) for fold in np.array_split(order, count)]
    without_choice = dataclasses.replace(recipe, keep="last", early_stopping=0)
    scores: list[float] = []
    for fold, kept in zip(folds, checkpoints[:count], strict=True):
        rest = np.setdiff1d(order, fold)
        memory = build_memory(features, rest, recipe)
        student = fit(features, rest, fold, without_choice, lambda epoch: None, kept).student
        parts = make_parts(student, memory, recipe, features.matcher.device)
        maps, _ = _held_out_maps(parts, features, fold, recipe)
        scores += [each.score(recipe.top_fraction).total for each in maps]
    return np.sort(np.array(scores, np.float32))


def _held_out_maps(
    parts: Parts, features: TeacherFeatures, chosen: Indices, recipe: Recipe
) -> tuple[list[AnomalyMap], list[list[npt.NDArray[np.float32]]]]:
    """Anomaly maps of held-out images, and what the scales of the parts come from."""
    distances = _distances(parts, features, chosen)
    content = features.images.content[chosen]
    values = _values(distances, content, features.matcher)
    return _maps(distances, content, features.matcher, recipe, values), values


def _distances(parts: Parts, features: TeacherFeatures, chosen: Indices) -> Distances:
    matcher = features.matcher
    results = []
    for batch in batches(chosen, EVALUATION_BATCH):
        inputs = features.inputs(torch.from_numpy(batch))
        teacher = matcher.teacher_features(inputs)
        results.append(matcher.distances(parts, teacher, inputs, features.images.content[batch]))
    return Distances.concatenate(results)


def _values(distances: Distances, content: Boxes, matcher: Matcher) -> list[list[npt.NDArray[np.float32]]]:
    """For each part, some of the distances of each image."""
    maps = distances.maps
    valid = matcher.content_masks(content, [shape_of(d) for d in maps])
    return [part_values(d, v) for d, v in zip(maps, valid, strict=True)]


def _maps(
    distances: Distances,
    content: Boxes,
    matcher: Matcher,
    recipe: Recipe,
    values: Sequence[Sequence[npt.NDArray[np.float32]]],
) -> list[AnomalyMap]:
    """Anomaly maps of held-out images, each on the scales that the others give."""
    if recipe.fusion != "quantile":
        return matcher.anomaly_maps(distances, content, recipe.fusing, ())
    of_images = zip(*(part_scales_without_each(part) for part in values), strict=True)
    return [
        matcher.anomaly_maps(distances.images(slice(i, i + 1)), content[i : i + 1], recipe.fusing, scales)[0]
        for i, scales in enumerate(of_images)
    ]
