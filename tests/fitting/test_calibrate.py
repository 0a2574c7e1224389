from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from stpm.detector import Detector
from stpm.fitting.build_memory import MemoryCandidates
from stpm.fitting.calibrate import calibrate
from stpm.fitting.splits import Indices, split_folds, split_images
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.train_student import train_student
from stpm.fitting.training_images import TrainingImages
from stpm.method import preprocessing
from stpm.method.fusion import Distances
from stpm.method.recipe import Recipe
from tests.conftest import MODELS
from tests.fitting.helpers import (
    PADDED,
    RAM,
    FeaturesOf,
    anomaly_maps,
    build_memory,
    fit_uncalibrated,
    select,
    unpadded,
)


@pytest.mark.parametrize("padded", [False, True])
def test_calibration_scores_held_out_images_as_scoring_does(
    images: TrainingImages, any_model: Recipe, features_of: FeaturesOf, padded: bool
) -> None:
    """Score each held-out image on the scales that the other held-out images give."""
    if padded:
        images = dataclasses.replace(images, content=PADDED)
    recipe = dataclasses.replace(any_model, held_out_fraction=0.5)
    features = features_of(recipe, images)
    train, held_out = split_images(np.arange(len(images)), recipe)
    detector = fit_uncalibrated(features, train, held_out, recipe)
    scores, heatmap_scale, distance_scales, max_pixels = calibrate(
        detector, features, [(detector.memory, held_out)], held_out
    )
    views = len(detector.teacher.views)
    maps_count = (len(recipe.levels) if detector.student else 0) + len(detector.memory)
    scales_count = maps_count + (views if views > 1 else 0)
    assert len(distance_scales) == (scales_count if recipe.fusion == "quantile" else 0)
    maps = []
    for i in held_out:
        _, _, scales, _ = calibrate(detector, features, [(detector.memory, held_out[held_out != i])], held_out)
        maps += anomaly_maps(detector, select(images, [i]), scales)
    expected = [score for each in maps for score in each.scalars(recipe.top_fraction)[:, 2].tolist()]
    # The teacher's cached features are rounded.
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=5e-3)
    np.testing.assert_allclose(max_pixels, [each.inspected_values().max() for each in maps], rtol=1e-3, atol=5e-3)
    pixels = np.concatenate([each.inspected_values() for each in maps])
    assert heatmap_scale.low == pytest.approx(np.quantile(pixels, 0.99), rel=1e-3, abs=5e-3)
    assert heatmap_scale.good_max == pytest.approx(pixels.max(), rel=1e-3, abs=5e-3)


@pytest.mark.parametrize("padded", [False, True])
def test_distances_that_ram_does_not_hold_are_recomputed_to_the_same_bits(
    images: TrainingImages, any_model: Recipe, features_of: FeaturesOf, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if padded:
        images = dataclasses.replace(images, content=PADDED)
    features, held_out = features_of(any_model, images), np.arange(9)
    detector = fit_uncalibrated(features, held_out, held_out, any_model)
    monkeypatch.setattr(preprocessing, "MAX_CPU_BATCH", 2)
    a_batch = detector.distances(features.inputs(held_out[:2]), images.content[:2]).nbytes
    computed: list[int] = []
    original = Detector.distances

    def count(self: Detector, *arguments: Any) -> Any:
        computed.append(len(arguments[-1]))
        return original(self, *arguments)

    monkeypatch.setattr(Detector, "distances", count)
    found = []
    for ram, times in ((features.ram_left, 5), (2 * a_batch, 8), (0, 10), (-1, 10)):
        computed.clear()
        features.ram_left = ram
        found.append(calibrate(detector, features, [(detector.memory, held_out)], held_out))
        assert len(computed) == times
    for scores, *scales, max_pixels in found[1:]:
        np.testing.assert_array_equal((scores, max_pixels), (found[0][0], found[0][-1]))
        assert tuple(scales) == found[0][1:-1]


def test_distance_scales_are_quantiles_on_held_out_images(
    images: TrainingImages, any_model: Recipe, features_of: FeaturesOf
) -> None:
    recipe = dataclasses.replace(any_model, fusion="quantile")
    features, held_out = features_of(recipe), np.array([1, 4, 8])
    detector = fit_uncalibrated(features, np.array([0, 2, 3, 5, 6, 7]), held_out, recipe)
    inputs = detector.teacher.inputs(torch.from_numpy(images.pixels[held_out]))
    distances = detector.distances(inputs, images.content[held_out])
    _, _, scales, _ = calibrate(detector, features, [(detector.memory, held_out)], held_out)
    maps = detector.on_one_grid(distances, images.content[held_out])
    for scale, part in zip(scales, maps, strict=len(detector.teacher.views) == 1):
        # Maps of this size are not sampled: all positions count.
        expected = np.quantile(part.numpy(), (0.9, 0.995), method="inverted_cdf")
        assert [scale.low, scale.high] == pytest.approx(expected.tolist(), rel=1e-3)


def calibrate_by_folds(features: TeacherFeatures, recipe: Recipe, groups: Indices | None = None) -> Any:
    """Calibrate the detector of all images by folds."""
    everything = np.arange(len(features.images))
    groups = everything if groups is None else groups
    candidates = MemoryCandidates(features, everything, recipe)
    train, held_out = split_images(groups, recipe)
    student = train_student(features, train, held_out, recipe, lambda epoch: None).student
    detector = Detector.assemble(features.teacher, recipe, student, candidates.banks)
    parts = ((candidates.banks_without(fold), fold) for fold in split_folds(groups, recipe))
    return calibrate(detector, features, parts, held_out)


@pytest.mark.parametrize("kind", ["student and memory", "two views"])
def test_a_student_that_knows_an_image_calibrates_like_one_that_does_not(
    features_of: FeaturesOf, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distances of images that it was trained on are a half here; calibration undoes that."""
    recipe = dataclasses.replace(MODELS[kind], calibration_folds=3)
    features, held_out = features_of(recipe), np.array([1, 4, 8])
    candidates = MemoryCandidates(features, np.arange(9), recipe)
    student = train_student(features, np.arange(9), held_out, recipe, lambda epoch: None).student
    detector = Detector.assemble(features.teacher, recipe, student, candidates.banks)
    # The same images twice: to calibrate on, and as images that the student knows.
    parts = [(detector.memory, held_out), (detector.memory, held_out)]
    expected, _, scales, _ = calibrate(detector, features, parts, held_out)
    calls: list[int] = []
    original = Detector.distances

    def lower(self: Detector, *arguments: Any) -> Any:
        distances = original(self, *arguments)
        calls.append(1)
        return Distances(tuple(d / 2 for d in distances.student), distances.memory) if len(calls) > 1 else distances

    monkeypatch.setattr(Detector, "distances", lower)
    twins = select(features.images, [*range(9), *held_out])
    doubled = TeacherFeatures(features.teacher, twins, RAM)
    known = [(detector.memory, held_out), (detector.memory, np.arange(9, 12))]
    scores, _, found, _ = calibrate(detector, doubled, known, held_out)
    np.testing.assert_allclose(scores[:3], expected[::2], rtol=1e-3, atol=5e-3)
    np.testing.assert_allclose(scores[3:], expected[::2], rtol=1e-3, atol=5e-3)
    assert [(s.low, s.high) for s in found] == [pytest.approx((s.low, s.high), rel=1e-3, abs=5e-3) for s in scales]


@pytest.mark.parametrize("kind", ["student and memory", "memory", "two views"])
def test_fold_does_not_remember_the_images_it_scores(
    images: TrainingImages, features_of: FeaturesOf, kind: str
) -> None:
    """Two images are unlike all others: if their folds' memory held them, they would score no higher than these do."""
    recipe = dataclasses.replace(MODELS[kind], memory=100_000, calibration_folds=9)
    pixels, others = images.pixels.copy(), np.delete(np.arange(9), [4, 6])
    pixels[[4, 6]] = (255, 0, 0)
    features = features_of(recipe, unpadded(pixels))
    known, *_ = calibrate_by_folds(features, recipe)
    assert known[[4, 6]].max() < known[others].max()
    # They are of one group, so they are in one fold.
    scores, *_ = calibrate_by_folds(features, recipe, np.array([0, 1, 2, 3, 4, 5, 4, 7, 8]))
    assert scores[[4, 6]].min() > scores[others].max() + np.ptp(scores[others])


def test_scores_of_folds_are_those_of_banks_that_never_saw_them(features_of: FeaturesOf) -> None:
    """Where the banks hold every descriptor, there is nothing to choose anew."""
    recipe = dataclasses.replace(MODELS["memory"], memory=100_000, calibration_folds=3, brightness=0.1)
    features = features_of(recipe)
    folds = split_folds(np.arange(9), recipe)
    detector = fit_uncalibrated(features, np.arange(9), np.arange(9), recipe)
    parts = [(build_memory(features, np.setdiff1d(np.arange(9), fold), recipe), fold) for fold in folds]
    expected, *_ = calibrate(detector, features, parts, np.arange(9))
    scores, *_ = calibrate_by_folds(features, recipe)
    assert scores.shape == (9,)
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-3)
