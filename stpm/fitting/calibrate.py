"""Calibration: images that no part of a model has seen, scored by the code that scoring uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import numpy.typing as npt
import torch

from stpm.fitting.coreset import build_memory
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.train_student import EVALUATION_BATCH, Checkpoints, Indices, batches, fit
from stpm.method.backbones import StateDict, load_backbone
from stpm.method.calibration import Calibration, HeatmapScaleBuilder, PartScale, fit_part_scale, leave_one_out_scales
from stpm.method.forward import Distances, Parts, spatial_shape, to_device
from stpm.method.fusion import AnomalyMap, sample_distances
from stpm.method.memory_bank import MemoryBank
from stpm.method.recipe import Recipe


@dataclass(frozen=True)
class Calibrated:
    """What held-out normals say of a model: `scales` of its parts, in the order of `Distances.maps`."""

    calibration: Calibration
    scales: tuple[PartScale, ...]


def make_parts(student: StateDict | None, memory: Sequence[MemoryBank], recipe: Recipe, device: torch.device) -> Parts:
    """The parts of a fitted model, ready to score on a device."""
    backbone = None
    if student is not None:
        backbone = load_backbone(recipe.teacher, recipe.levels, student, "fitted student")
        backbone = to_device(backbone, device)
    return Parts(backbone, tuple(memory))


def calibrate_model(
    parts: Parts, features: TeacherFeatures, held_out: Indices, recipe: Recipe, budget: int
) -> Calibrated:
    """Scales, scores and heatmap scale from the held-out images.

    Args:
        parts: of the model.
        features: of the images.
        held_out: which images to use; none that the parts were fitted on.
        recipe: how the parts' distances are fused.
        budget: see `HeldOut`.
    """
    images = HeldOut(parts, features, held_out, recipe, budget)
    left, top, right, bottom = features.images.content[held_out].T.astype(np.int64)
    heatmap_range = HeatmapScaleBuilder(int(((right - left) * (bottom - top)).sum()))
    scores = []
    for each in images.maps():
        scores.append(each.score(recipe.top_fraction).total)
        heatmap_range.add(each.total)
    calibration = Calibration(np.sort(scores).astype(np.float32), heatmap_range.build())
    return Calibrated(calibration, tuple(map(fit_part_scale, images.values)))


def k_fold_scores(
    features: TeacherFeatures, recipe: Recipe, checkpoints: Sequence[Checkpoints | None], budget: int
) -> npt.NDArray[np.float32]:
    """One score for every image, from models that were fitted without it: ascending, of length N.

    Each fold's student runs all epochs and keeps the last, so that no choice is made on the fold that it scores.

    Args:
        features: the images and their features.
        recipe: with the number of folds.
        checkpoints: where each fold's fit keeps its progress.
        budget: see `HeldOut`.
    """
    total = len(features.images)
    order = np.random.default_rng(recipe.seed).permutation(total)
    count = recipe.fold_count(total)
    folds = [np.sort(fold) for fold in np.array_split(order, count)]
    without_choice = dataclasses.replace(recipe, keep="last", early_stopping=0)
    scores: list[float] = []
    for fold, kept in zip(folds, checkpoints[:count], strict=True):
        rest = np.setdiff1d(order, fold)
        memory = build_memory(features, rest, recipe)
        student = fit(features, rest, fold, without_choice, lambda epoch: None, kept).student
        parts = make_parts(student, memory, recipe, features.matcher.device)
        maps = HeldOut(parts, features, fold, recipe, budget).maps()
        scores += [each.score(recipe.top_fraction).total for each in maps]
    return np.sort(np.array(scores, np.float32))


class HeldOut:
    """Held-out images as a model sees them: some of each part's distances, and anomaly maps, one at a time.

    Args:
        parts: of the model.
        features: of the images.
        chosen: which images are held out.
        recipe: how the parts' distances are fused.
        budget: bytes that distance maps may take between the two passes over the images; those beyond are computed
            anew, to the same bits.
    """

    def __init__(self, parts: Parts, features: TeacherFeatures, chosen: Indices, recipe: Recipe, budget: int) -> None:
        self._parts = parts
        self._features = features
        self._recipe = recipe
        self._batches = batches(chosen, EVALUATION_BATCH)
        self._kept: list[Distances] = []
        sampled: list[list[list[npt.NDArray[np.float32]]]] = []
        for batch in self._batches:
            distances = self._distances(batch)
            budget -= distances.nbytes
            if budget >= 0:
                self._kept.append(distances.to(torch.device("cpu")))
            masks = features.matcher.content_masks(
                features.images.content[batch], [spatial_shape(d) for d in distances.maps]
            )
            pairs = zip(distances.maps, masks, strict=True)
            sampled.append([sample_distances(d, mask, len(chosen)) for d, mask in pairs])
        # For each part, some of the distances of each image.
        self.values = [[image for batch in part for image in batch] for part in zip(*sampled, strict=True)]

    def maps(self) -> Iterator[AnomalyMap]:
        """The anomaly map of each image, on the scales that the others give."""
        matcher = self._features.matcher
        scales: Iterator[tuple[PartScale, ...]] = repeat(())
        if self._recipe.fusion == "quantile":
            scales = zip(*map(leave_one_out_scales, self.values), strict=True)
        for number, batch in enumerate(self._batches):
            kept = number < len(self._kept)
            distances = self._kept[number].to(matcher.device) if kept else self._distances(batch)
            content = self._features.images.content[batch]
            for one in (slice(i, i + 1) for i in range(len(batch))):
                yield from matcher.anomaly_maps(distances.images(one), content[one], self._recipe, next(scales))

    def _distances(self, batch: Indices) -> Distances:
        matcher = self._features.matcher
        indices = torch.from_numpy(batch)
        inputs = self._features.inputs(indices)
        teacher = matcher.teacher_features(inputs)
        return matcher.distances(self._parts, teacher, inputs, self._features.images.content[batch])
