"""Helpers of the tests of fitting: images, and models fitted on them."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from stpm.data.image_statistics import COMPARED
from stpm.detector import Detector
from stpm.fitting.build_memory import MemoryCandidates
from stpm.fitting.checkpoint import Checkpoint
from stpm.fitting.splits import Indices, split_images
from stpm.fitting.task import Epoch
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.train_student import TrainedStudent, train_student
from stpm.fitting.training_images import TrainingImages
from stpm.method.anomaly_maps import AnomalyMaps
from stpm.method.memory_bank import MemoryBank
from stpm.method.preprocessing import Content
from stpm.method.recipe import Recipe
from stpm.method.scales import DistanceScale
from tests.conftest import make_preprocessing

FeaturesOf = Callable[..., TeacherFeatures]
RAM = 2**30
# Where nine images lie in inputs of 64 x 64 pixels, with and without padding.
PADDED = Content(np.array([[0, 16, 64, 48], [0, 0, 64, 64], [20, 0, 44, 64]] * 3, np.int32))


def unpadded(pixels: np.ndarray) -> TrainingImages:
    """Make images that fill the input."""
    height, width = pixels.shape[1:3]
    content = Content(np.array([[0, 0, width, height]] * len(pixels), np.int32))
    statistics = np.zeros((len(pixels), len(COMPARED)), np.float32)
    names = tuple(f"/good/{i}.png" for i in range(len(pixels)))
    return TrainingImages(pixels, content, statistics, ("RGB",) * len(pixels), names, make_preprocessing(height, width))


def train_on(
    features: TeacherFeatures,
    recipe: Recipe,
    checkpoint: Checkpoint | None = None,
    seen: list[Epoch] | None = None,
) -> TrainedStudent:
    """Train a student, and check that every epoch is reported; `seen` gets them."""
    seen = [] if seen is None else seen
    trained = train_student(
        features, *split_images(np.arange(len(features.images)), recipe), recipe, seen.append, checkpoint
    )
    assert list(trained.history[len(trained.history) - len(seen) :]) == seen
    return trained


def replace_padding(features: TeacherFeatures, value: float) -> None:
    """Replace the cached features on padding."""
    for level, mask in zip(features._features, features.content_masks(np.arange(len(features.images))), strict=True):
        assert mask is not None
        level[~mask[:, None].expand_as(level)] = value


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def build_memory(features: TeacherFeatures, train: Indices, recipe: Recipe) -> tuple[MemoryBank, ...]:
    return MemoryCandidates(features, train, recipe).banks


def fit_uncalibrated(features: TeacherFeatures, train: Indices, held_out: Indices, recipe: Recipe) -> Detector:
    student = train_student(features, train, held_out, recipe, lambda epoch: None).student
    return Detector.assemble(features.teacher, recipe, student, build_memory(features, train, recipe))


def anomaly_maps(detector: Detector, images: TrainingImages, scales: Sequence[DistanceScale]) -> list[AnomalyMaps]:
    """Compute the maps of all images, as scoring does."""
    inputs = detector.teacher.inputs(torch.from_numpy(images.pixels))
    with torch.inference_mode():
        return detector.anomaly_maps(detector.distances(inputs, images.content), images.content, scales)


def select(images: TrainingImages, indices: Sequence[int] | Indices) -> TrainingImages:
    chosen = list(indices)
    modes, names = (tuple(each[i] for i in chosen) for each in (images.modes, images.names))
    content = images.content[np.array(chosen)]
    return dataclasses.replace(
        images,
        pixels=images.pixels[chosen],
        content=content,
        statistics=images.statistics[chosen],
        modes=modes,
        names=names,
    )
