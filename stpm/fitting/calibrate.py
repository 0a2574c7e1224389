"""Calibrate a model on images that it was not fitted on, with the same code that scoring uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat

import numpy as np
import torch

from stpm.detector import Detector
from stpm.fitting.build_memory import MemoryCandidates
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

# An image stands out if its score is this many times as far above the second as that is above the median. Of 20 scores
# with an exponential tail, the largest is in one of 1000 cases.
_FAR_ABOVE = 6.0
_MIN_SCORES = 10


def fit_folds(
    features: TeacherFeatures,
    groups: Indices,
    candidates: MemoryCandidates,
    recipe: Recipe,
    checkpoints: Sequence[Checkpoint | None],
) -> Iterator[tuple[Detector, Indices]]:
    """Fit a detector without each fold of the images (k-fold cross-validation); yield it, and the fold.

    Train the students of all folds for all epochs, and keep the last: to choose an epoch on the fold that is scored
    would bias its scores. Each fold's student has a checkpoint or None.
    """
    fold_recipe = dataclasses.replace(recipe, keep="last", early_stopping=0)
    for (rest, fold), checkpoint in zip(split_folds(groups, recipe), checkpoints, strict=False):
        student = train_student(features, rest, fold, fold_recipe, lambda epoch: None, checkpoint).student
        yield Detector.assemble(features.teacher, recipe, student, candidates.banks_without(fold)), fold


def calibrate(
    detector: Detector, features: TeacherFeatures, parts: Iterable[tuple[Detector, Indices]]
) -> tuple[Float32Array, HeatmapScale, tuple[DistanceScale, ...]]:
    """Measure scores, heatmap scale and distance scales on good images that a detector was not fitted on.

    Args:
        detector: the one to calibrate, not calibrated yet.
        features: of all images.
        parts: detectors like it, each with the images that it was not fitted on: itself with those that were held out,
            or those of `fit_folds` (cross-conformal prediction: Vovk, Cross-conformal predictors, 2015). There are n
            images in all, one or more; two or more if the recipe fuses by quantiles.

    Returns:
        The (n,) scores of the images, by ascending index; the model's heatmap scale; the scales as in
        `Detector.distance_scales`.
    """
    images, samples, maps = _compare(detector, features, parts)
    left, top, right, bottom = features.images.content[images].T.astype(np.int64)
    heatmap_scale = HeatmapScaleBuilder(int(((right - left) * (bottom - top)).sum()))
    scores = []
    for anomaly_map in maps:
        scores.append(anomaly_map.score(detector.recipe.top_fraction))
        heatmap_scale.add(anomaly_map.total)
    scales = fit_scales(samples, detector.map_weights) if samples else ()
    return np.array(scores, np.float32)[np.argsort(images)], heatmap_scale.build(), scales


def _compare(
    detector: Detector, features: TeacherFeatures, parts: Iterable[tuple[Detector, Indices]]
) -> tuple[Indices, list[Float32Array], Iterator[AnomalyMap]]:
    """Compare images with the detectors that were not fitted on them.

    An anomaly map needs scales from the other images, so compute all distance maps first. Those that RAM does not hold
    are computed again, to the same bits.

    Returns:
        The images, in the order of the parts. Of each, values of the distance maps at the same positions, for
        `fit_scales`: none unless the recipe fuses by quantiles. And an iterator over the images' anomaly maps, each on
        scales from the other images.
    """
    content = features.images.content
    kept: list[tuple[Indices, Callable[[], Distances]]] = []
    samples: list[Float32Array] = []
    ram_left = features.ram_left
    for one, held_out in parts:
        for batch in features.batches(held_out):
            compute = partial(_distances, one, features, batch)
            distances = compute()
            ram_left -= distances.nbytes
            kept.append((batch, partial(distances.to, torch.device("cpu")) if ram_left >= 0 else compute))
            if detector.recipe.fusion == "quantile":
                maps = detector.on_one_grid(distances, content[batch])
                (mask,) = features.teacher.content_masks(content[batch], [spatial_shape(maps)])
                samples += sample_distances(maps, mask, len(features.images))

    def anomaly_maps() -> Iterator[AnomalyMap]:
        scales: Iterator[tuple[DistanceScale, ...]] = repeat(())
        if samples:
            scales = iter(leave_one_out_scales(samples, detector.map_weights))
        for batch, distances_of in kept:
            distances = distances_of().to(detector.teacher.device)
            for one in (slice(i, i + 1) for i in range(len(batch))):
                yield from detector.anomaly_maps(distances.select(one), content[batch][one], next(scales))

    return np.concatenate([batch for batch, _ in kept]), samples, anomaly_maps()


def _distances(detector: Detector, features: TeacherFeatures, batch: Indices) -> Distances:
    levels = [level.float() for level in features(batch)]
    return detector.distances(features.inputs(batch), features.images.content[batch], levels)


def find_outlier(scores: Float32Array, names: Sequence[str]) -> str:
    """Name the calibration image whose score is far above all others; "" if there is none, or fewer than ten images."""
    if len(scores) < _MIN_SCORES:
        return ""
    largest = int(scores.argmax())
    second = float(np.sort(scores)[-2])
    if scores[largest] - second <= _FAR_ABOVE * (second - float(np.median(scores))):
        return ""
    return (
        f"look at {names[largest]}: it scores {scores[largest]:.3g}, all other good images at most {second:.3g}; if it "
        "has a defect, remove it and fit again: it raises the threshold"
    )
