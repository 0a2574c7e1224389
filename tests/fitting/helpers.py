"""Helpers of the tests of fitting: images without padding, and models fitted on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from stpm.data.image_statistics import COMPARED
from stpm.detector import Detector
from stpm.fitting.build_memory import build_memory
from stpm.fitting.splits import Indices, split_images
from stpm.fitting.task import Epoch
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.train_student import Checkpoints, TrainedStudent, train_student
from stpm.fitting.training_images import TrainingImages
from stpm.method.fusion import AnomalyMap
from stpm.method.recipe import Recipe
from stpm.method.scales import DistanceScale
from stpm.method.teacher import Teacher

TeacherOf = Callable[[Recipe], Teacher]
BUDGET = 2**30


def unpadded(pixels: np.ndarray) -> TrainingImages:
    """Make images that fill the input."""
    content = np.array([[0, 0, pixels.shape[2], pixels.shape[1]]] * len(pixels), np.int32)
    return TrainingImages(pixels, content, np.zeros((len(pixels), len(COMPARED)), np.float32))


def train_on(
    images: TrainingImages,
    recipe: Recipe,
    make_teacher: TeacherOf,
    checkpoints: Checkpoints | None = None,
    budget: int = BUDGET,
) -> tuple[TrainedStudent, list[Epoch]]:
    seen: list[Epoch] = []
    features = TeacherFeatures(make_teacher(recipe), images, budget)
    assert features.cached == (budget > 0)
    train, held_out = split_images(len(images), recipe)
    return train_student(features, train, held_out, recipe, seen.append, checkpoints), seen


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def fit_uncalibrated(features: TeacherFeatures, train: Indices, held_out: Indices, recipe: Recipe) -> Detector:
    student = train_student(features, train, held_out, recipe, lambda epoch: None).student
    return Detector.assemble(features.teacher, recipe, student, build_memory(features, train, recipe))


def anomaly_maps(detector: Detector, images: TrainingImages, scales: Sequence[DistanceScale]) -> list[AnomalyMap]:
    """Compute the maps of all images, as scoring does."""
    inputs = detector.teacher.inputs(torch.from_numpy(images.pixels))
    with torch.inference_mode():
        return detector.anomaly_maps(detector.distances(inputs, images.content), images.content, scales)


def select(images: TrainingImages, indices: Sequence[int] | Indices) -> TrainingImages:
    chosen = list(indices)
    return TrainingImages(images.pixels[chosen], images.content[chosen], images.statistics[chosen])
