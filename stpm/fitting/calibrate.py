"""Calibrate a model on images that it was not fitted on, with the same code that scoring uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from stpm.fitting.build_memory import build_memory
from stpm.fitting.teacher_features import EVALUATION_BATCH_SIZE, Indices, TeacherFeatures, split_batches
from stpm.fitting.train_student import Checkpoints, train_student
from stpm.method.backbones import StateDict, load_backbone
from stpm.method.calibration import (
    Calibration,
    DistanceScale,
    HeatmapScaleBuilder,
    fit_distance_scale,
    leave_one_out_scales,
)
from stpm.method.forward import Distances, Parts, spatial_shape
from stpm.method.fusion import AnomalyMap, sample_distances
from stpm.method.memory_bank import MemoryBank
from stpm.method.recipe import Recipe


class CalibrationResult(NamedTuple):
    """A model's calibration, and the scale of each of its distance maps, in the order of `Distances.maps`."""

    calibration: Calibration
    distance_scales: tuple[DistanceScale, ...]


def make_parts(student: StateDict | None, memory: Sequence[MemoryBank], recipe: Recipe, device: torch.device) -> Parts:
    """Make the parts of a fitted model, ready to score on a device."""
    backbone = None if student is None else load_backbone(recipe.teacher, recipe.levels, student, "fitted student")
    return Parts(backbone, tuple(memory)).to(device)


def calibrate_model(
    parts: Parts, features: TeacherFeatures, held_out: Indices, recipe: Recipe, budget: int
) -> CalibrationResult:
    """Measure scores, heatmap scale and distance scales on held-out images; for the budget see `HeldOutDistances`."""
    distances = HeldOutDistances(parts, features, held_out, recipe, budget)
    left, top, right, bottom = features.images.content[held_out].T.astype(np.int64)
    scale_builder = HeatmapScaleBuilder(int(((right - left) * (bottom - top)).sum()))
    scores = []
    for anomaly_map in distances.anomaly_maps():
        scores.append(anomaly_map.score(recipe.top_fraction).total)
        scale_builder.add(anomaly_map.total)
    calibration = Calibration(np.sort(scores).astype(np.float32), scale_builder.build())
    return CalibrationResult(calibration, tuple(map(fit_distance_scale, distances.samples)))


def cross_validate_scores(
    features: TeacherFeatures, recipe: Recipe, checkpoints: Sequence[Checkpoints | None], budget: int
) -> npt.NDArray[np.float32]:
    """Score every image by a model fitted without it (k-fold cross-validation); return N scores, ascending.

    Train the students of all folds for all epochs, and keep the last: to choose an epoch on the fold that is scored
    would bias its scores. Each student has checkpoints of its own. For the budget see `HeldOutDistances`.
    """
    image_count = len(features.images)
    fold_count = recipe.fold_count(image_count)
    order = np.random.default_rng(recipe.seed).permutation(image_count)
    folds = [np.sort(fold) for fold in np.array_split(order, fold_count)]
    fold_recipe = dataclasses.replace(recipe, keep="last", early_stopping=0)
    scores: list[float] = []
    for fold, fold_checkpoints in zip(folds, checkpoints[:fold_count], strict=True):
        rest = np.setdiff1d(order, fold)
        memory = build_memory(features, rest, recipe)
        student = train_student(features, rest, fold, fold_recipe, lambda epoch: None, fold_checkpoints).student
        parts = make_parts(student, memory, recipe, features.matcher.device)
        maps = HeldOutDistances(parts, features, fold, recipe, budget).anomaly_maps()
        scores += [anomaly_map.score(recipe.top_fraction).total for anomaly_map in maps]
    return np.sort(np.array(scores, np.float32))


class HeldOutDistances:
    """Distance maps of held-out images, and the anomaly maps that follow from them.

    An anomaly map needs distance scales from the other held-out images, so compute all distance maps first. Cache them
    up to a budget of bytes, and compute those beyond it a second time, to the same bits.

    Attributes:
        samples: for each distance map, some of the distances of each image.
    """

    def __init__(self, parts: Parts, features: TeacherFeatures, held_out: Indices, recipe: Recipe, budget: int) -> None:
        self._parts = features.matcher.compile(parts)
        self._features = features
        self._recipe = recipe
        self._batches = split_batches(held_out, EVALUATION_BATCH_SIZE)
        self._cache: list[Distances] = []
        batch_samples: list[list[list[npt.NDArray[np.float32]]]] = []
        for batch in self._batches:
            distances = self._compute(batch)
            budget -= distances.nbytes
            if budget >= 0:
                self._cache.append(distances.to(torch.device("cpu")))
            shapes = [spatial_shape(each) for each in distances.maps]
            masks = features.matcher.content_masks(features.images.content[batch], shapes)
            pairs = zip(distances.maps, masks, strict=True)
            batch_samples.append([sample_distances(each, mask, len(held_out)) for each, mask in pairs])
        self.samples = [[image for batch in batches for image in batch] for batches in zip(*batch_samples, strict=True)]

    def anomaly_maps(self) -> Iterator[AnomalyMap]:
        """Yield the anomaly map of each image, on distance scales from the other held-out images."""
        matcher = self._features.matcher
        scales: Iterator[tuple[DistanceScale, ...]] = repeat(())
        if self._recipe.fusion == "quantile":
            scales = zip(*map(leave_one_out_scales, self.samples), strict=True)
        for number, batch in enumerate(self._batches):
            cached = number < len(self._cache)
            distances = self._cache[number].to(matcher.device) if cached else self._compute(batch)
            content = self._features.images.content[batch]
            for one in (slice(i, i + 1) for i in range(len(batch))):
                yield from matcher.anomaly_maps(distances.select(one), content[one], self._recipe, next(scales))

    def _compute(self, batch: Indices) -> Distances:
        matcher = self._features.matcher
        inputs = self._features.inputs(batch)
        teacher = matcher.teacher_features(inputs)
        return matcher.distances(self._parts, teacher, inputs, self._features.images.content[batch])
