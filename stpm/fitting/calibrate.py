"""Calibrate a model on images that it was not fitted on, with the same code that scoring uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from stpm.detector import Detector
from stpm.fitting.build_memory import build_memory
from stpm.fitting.splits import Indices, split_batches, split_folds
from stpm.fitting.teacher_features import EVALUATION_BATCH_SIZE, TeacherFeatures
from stpm.fitting.train_student import Checkpoints, train_student
from stpm.method.fusion import AnomalyMap, Distances, Float32Array, sample_distances
from stpm.method.recipe import Recipe
from stpm.method.scales import (
    DistanceScale,
    HeatmapScale,
    HeatmapScaleBuilder,
    fit_distance_scale,
    leave_one_out_scales,
)
from stpm.method.teacher import spatial_shape


class CalibrationResult(NamedTuple):
    """What calibration measures on n held-out images.

    Args:
        scores: (n,) float32, of the images, in their order.
        heatmap_scale: of the model.
        distance_scales: of each distance map, in the order of `Distances.maps`; none unless the recipe fuses by
            quantiles.
    """

    scores: npt.NDArray[np.float32]
    heatmap_scale: HeatmapScale
    distance_scales: tuple[DistanceScale, ...]


def calibrate_detector(
    detector: Detector, features: TeacherFeatures, held_out: Indices, budget: int
) -> CalibrationResult:
    """Measure scores, heatmap scale and distance scales on held-out images.

    Args:
        detector: not calibrated yet.
        features: the images, and the detector's teacher.
        held_out: indices of the held-out images, one or more; two or more if the recipe fuses by quantiles.
        budget: bytes of RAM for cached distance maps; those beyond it are computed twice, to the same bits.
    """
    distances = HeldOutDistances.compute(detector, features, held_out, budget)
    left, top, right, bottom = features.images.content[held_out].T.astype(np.int64)
    scale_builder = HeatmapScaleBuilder(int(((right - left) * (bottom - top)).sum()))
    scores = []
    for anomaly_map in distances.anomaly_maps():
        scores.append(anomaly_map.score(detector.recipe.top_fraction).total)
        scale_builder.add(anomaly_map.total)
    distance_scales = tuple(map(fit_distance_scale, distances.samples))
    return CalibrationResult(np.array(scores, np.float32), scale_builder.build(), distance_scales)


def cross_validate_scores(
    features: TeacherFeatures, recipe: Recipe, checkpoints: Sequence[Checkpoints | None], budget: int
) -> npt.NDArray[np.float32]:
    """Score every image by a model fitted without it (k-fold cross-validation); return (N,) scores in their order.

    Train the students of all folds for all epochs, and keep the last: to choose an epoch on the fold that is scored
    would bias its scores.

    Args:
        features: the images, and the teacher.
        recipe: the model's recipe, with two `calibration_folds` or more.
        checkpoints: one for the student of each fold; None: save none.
        budget: bytes of RAM for cached distance maps, as in `calibrate_detector`.
    """
    folds = split_folds(len(features.images), recipe)
    fold_recipe = dataclasses.replace(recipe, keep="last", early_stopping=0)
    scores = np.empty(len(features.images), np.float32)
    for (rest, fold), fold_checkpoints in zip(folds, checkpoints, strict=True):
        memory = build_memory(features, rest, recipe)
        student = train_student(features, rest, fold, fold_recipe, lambda epoch: None, fold_checkpoints).student
        detector = Detector.assemble(features.teacher, recipe, student, memory)
        maps = HeldOutDistances.compute(detector, features, fold, budget).anomaly_maps()
        scores[fold] = [anomaly_map.score(recipe.top_fraction).total for anomaly_map in maps]
    return scores


@dataclass(frozen=True)
class HeldOutDistances:
    """Distance maps of held-out images, and the anomaly maps that follow from them.

    An anomaly map needs distance scales from the other held-out images, so compute all distance maps first.

    Args:
        detector: not calibrated yet.
        features: the images, and the detector's teacher.
        batches: indices of the held-out images, batch by batch.
        cached: distances of the first batches, on the CPU; those of the others are computed again, to the same bits.
        samples: for each distance map, in the order of `Distances.maps`, some of the distances of each held-out image,
            as `sample_distances` returns them; empty unless the recipe fuses by quantiles.
    """

    detector: Detector
    features: TeacherFeatures
    batches: list[Indices]
    cached: list[Distances]
    samples: list[list[Float32Array]]

    @classmethod
    def compute(cls, detector: Detector, features: TeacherFeatures, held_out: Indices, budget: int) -> HeldOutDistances:
        """Compute the distances of all held-out images, to sample them and to cache some.

        Args:
            detector: not calibrated yet.
            features: the images, and the detector's teacher.
            held_out: indices of the held-out images.
            budget: bytes of RAM for cached distance maps; those beyond it are computed twice.
        """
        batches = split_batches(held_out, EVALUATION_BATCH_SIZE)
        cached: list[Distances] = []
        samples: list[list[Float32Array]] = []
        for batch in batches:
            distances = _compute_distances(detector, features, batch)
            budget -= distances.nbytes
            if budget >= 0:
                cached.append(distances.to(torch.device("cpu")))
            if detector.recipe.fusion == "quantile":
                samples = samples or [[] for _ in distances.maps]
                batch_samples = _sample_maps(distances, features, batch, len(held_out))
                for map_samples, image_samples in zip(samples, batch_samples, strict=True):
                    map_samples.extend(image_samples)
        return cls(detector, features, batches, cached, samples)

    def anomaly_maps(self) -> Iterator[AnomalyMap]:
        """Yield the anomaly map of each image, on distance scales from the other held-out images."""
        scales: Iterator[tuple[DistanceScale, ...]] = repeat(())
        if self.samples:
            scales = zip(*map(leave_one_out_scales, self.samples), strict=True)
        for number, batch in enumerate(self.batches):
            if number < len(self.cached):
                distances = self.cached[number].to(self.detector.teacher.device)
            else:
                distances = _compute_distances(self.detector, self.features, batch)
            content = self.features.images.content[batch]
            for one in (slice(i, i + 1) for i in range(len(batch))):
                yield from self.detector.anomaly_maps(distances.select(one), content[one], next(scales))


def _compute_distances(detector: Detector, features: TeacherFeatures, batch: Indices) -> Distances:
    """Compute the distances of a batch. Run the teacher, too: cached features are rounded, and scoring's are not."""
    return detector.distances(features.inputs(batch), features.images.content[batch])


def _sample_maps(
    distances: Distances, features: TeacherFeatures, batch: Indices, held_out_count: int
) -> list[list[Float32Array]]:
    """Sample each distance map of a batch, one array per image."""
    shapes = [spatial_shape(distance_map) for distance_map in distances.maps]
    masks = features.teacher.content_masks(features.images.content[batch], shapes)
    pairs = zip(distances.maps, masks, strict=True)
    return [sample_distances(distance_map, mask, held_out_count) for distance_map, mask in pairs]
