"""Calibrate a model on images that it was not fitted on, with the same code that scoring uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import repeat

import numpy as np
import torch

from stpm.detector import Detector
from stpm.fitting.build_memory import build_memory
from stpm.fitting.checkpoint import Checkpoint
from stpm.fitting.splits import Indices, split_folds
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.train_student import train_student
from stpm.method.fusion import AnomalyMap, Distances, Float32Array, sample_distances
from stpm.method.recipe import Recipe
from stpm.method.scales import (
    DistanceScale,
    HeatmapScale,
    HeatmapScaleBuilder,
    fit_scales,
    leave_one_out_scales,
)
from stpm.method.teacher import spatial_shape


def calibrate_detector(
    detector: Detector, features: TeacherFeatures, held_out: Indices
) -> tuple[Float32Array, HeatmapScale, tuple[DistanceScale, ...]]:
    """Measure scores, heatmap scale and distance scales on n images that a detector was not fitted on.

    There are one image or more; two or more if the recipe fuses by quantiles.

    Returns:
        The (n,) scores of the images, in their order; the model's heatmap scale; the scales as in
        `Detector.distance_scales`.
    """
    samples, maps = _compare(detector, features, held_out)
    left, top, right, bottom = features.images.content[held_out].T.astype(np.int64)
    heatmap_scale = HeatmapScaleBuilder(int(((right - left) * (bottom - top)).sum()))
    scores = []
    for anomaly_map in maps:
        scores.append(anomaly_map.score(detector.recipe.top_fraction))
        heatmap_scale.add(anomaly_map.total)
    scales = fit_scales(samples, detector.map_weights) if samples else ()
    return np.array(scores, np.float32), heatmap_scale.build(), scales


def cross_validate_scores(
    features: TeacherFeatures, recipe: Recipe, checkpoints: Sequence[Checkpoint | None]
) -> Float32Array:
    """Score every image by a model fitted without it (k-fold cross-validation); return (N,) scores in their order.

    Train the students of all folds for all epochs, and keep the last: to choose an epoch on the fold that is scored
    would bias its scores. The recipe has two `calibration_folds` or more; each fold's student has a checkpoint or None.
    """
    fold_recipe = dataclasses.replace(recipe, keep="last", early_stopping=0)
    scores = np.empty(len(features.images), np.float32)
    for (rest, fold), checkpoint in zip(split_folds(len(scores), recipe), checkpoints, strict=True):
        memory = build_memory(features, rest, recipe)
        student = train_student(features, rest, fold, fold_recipe, lambda epoch: None, checkpoint).student
        _, maps = _compare(Detector.assemble(features.teacher, recipe, student, memory), features, fold)
        scores[fold] = [anomaly_map.score(recipe.top_fraction) for anomaly_map in maps]
    return scores


def _compare(
    detector: Detector, features: TeacherFeatures, held_out: Indices
) -> tuple[list[Float32Array], Iterator[AnomalyMap]]:
    """Compare held-out images with a detector that is not calibrated.

    An anomaly map needs scales from the other held-out images, so compute all distance maps first. Those that RAM does
    not hold are computed again, to the same bits.

    Returns:
        Of each image, values of the distance maps at the same positions, for `fit_scales`: none unless the recipe fuses
        by quantiles. And an iterator over the images' anomaly maps, each on scales from the other images.
    """
    content = features.images.content

    def compute(batch: Indices) -> Distances:
        # The teacher runs again, too: cached features are rounded, and scoring's are not.
        return detector.distances(features.inputs(batch), content[batch])

    batches = features.batches(held_out)
    kept: list[Distances | None] = []
    samples: list[Float32Array] = []
    ram_left = features.ram_left
    for batch in batches:
        distances = compute(batch)
        ram_left -= distances.nbytes
        kept.append(distances.to(torch.device("cpu")) if ram_left >= 0 else None)
        if detector.recipe.fusion == "quantile":
            maps = detector.on_one_grid(distances, content[batch])
            (mask,) = features.teacher.content_masks(content[batch], [spatial_shape(maps)])
            samples += sample_distances(maps, mask, len(held_out))

    def anomaly_maps() -> Iterator[AnomalyMap]:
        scales: Iterator[tuple[DistanceScale, ...]] = repeat(())
        if samples:
            scales = iter(leave_one_out_scales(samples, detector.map_weights))
        for batch, in_ram in zip(batches, kept, strict=True):
            distances = in_ram.to(detector.teacher.device) if in_ram else compute(batch)
            for one in (slice(i, i + 1) for i in range(len(batch))):
                yield from detector.anomaly_maps(distances.select(one), content[batch][one], next(scales))

    return samples, anomaly_maps()
