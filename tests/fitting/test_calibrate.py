from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from stpm.detector import Detector
from stpm.fitting import calibrate
from stpm.fitting.calibrate import calibrate_detector, cross_validate_scores
from stpm.fitting.splits import Indices, split_images
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.train_student import TrainedStudent, train_student
from stpm.fitting.training_images import TrainingImages
from stpm.method import preprocessing
from stpm.method.calibration import Calibration
from stpm.method.recipe import Recipe
from tests.conftest import MODELS
from tests.fitting.helpers import PADDED, FeaturesOf, anomaly_maps, fit_uncalibrated, select, unpadded


@pytest.mark.parametrize("padded", [False, True])
def test_calibration_scores_held_out_images_as_scoring_does(
    images: TrainingImages, any_model: Recipe, features_of: FeaturesOf, padded: bool
) -> None:
    """Score each held-out image on the scales that the other held-out images give."""
    if padded:
        images = dataclasses.replace(images, content=PADDED)
    recipe = dataclasses.replace(any_model, held_out_fraction=0.5)
    features = features_of(recipe, images)
    train, held_out = split_images(len(images), recipe)
    detector = fit_uncalibrated(features, train, held_out, recipe)
    scores, heatmap_scale, distance_scales = calibrate_detector(detector, features, held_out)
    views = len(detector.teacher.views)
    maps_count = (len(recipe.levels) if detector.student else 0) + len(detector.memory)
    scales_count = maps_count + (views if views > 1 else 0)
    assert len(distance_scales) == (scales_count if recipe.fusion == "quantile" else 0)
    maps = []
    for i in held_out:
        _, _, scales = calibrate_detector(detector, features, held_out[held_out != i])
        maps += anomaly_maps(detector, select(images, [i]), scales)
    expected = [each.score(recipe.top_fraction) for each in maps]
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4)
    pixels = np.concatenate([each.total.ravel() for each in maps])
    assert heatmap_scale.low == pytest.approx(np.quantile(pixels, 0.99), rel=1e-3, abs=1e-4)
    assert heatmap_scale.good_max == pytest.approx(pixels.max(), rel=1e-3, abs=1e-4)
    boxes = images.content[held_out].tolist()
    assert [each.total.shape for each in maps] == [(bottom - top, right - left) for left, top, right, bottom in boxes]


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
        found.append(calibrate_detector(detector, features, held_out))
        assert len(computed) == times
    for scores, *scales in found[1:]:
        np.testing.assert_array_equal(scores, found[0][0])
        assert tuple(scales) == found[0][1:]


def test_distance_scales_are_quantiles_on_held_out_images(
    images: TrainingImages, any_model: Recipe, features_of: FeaturesOf
) -> None:
    recipe = dataclasses.replace(any_model, fusion="quantile")
    features, held_out = features_of(recipe), np.array([1, 4, 8])
    detector = fit_uncalibrated(features, np.array([0, 2, 3, 5, 6, 7]), held_out, recipe)
    inputs = detector.teacher.inputs(torch.from_numpy(images.pixels[held_out]))
    distances = detector.distances(inputs, images.content[held_out])
    _, _, scales = calibrate_detector(detector, features, held_out)
    maps = detector.on_one_grid(distances, images.content[held_out])
    for scale, part in zip(scales, maps, strict=len(detector.teacher.views) == 1):
        # Maps of this size are not sampled: all positions count.
        expected = np.quantile(part.numpy(), (0.9, 0.995), method="inverted_cdf")
        assert [scale.low, scale.high] == pytest.approx(expected.tolist(), rel=1e-3)


@pytest.mark.parametrize("folds", [2, 3, 12])
def test_cross_validation_scores_every_image_once(
    any_model: Recipe, features_of: FeaturesOf, folds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(any_model, calibration_folds=folds)
    trained: list[int] = []

    def remember(features: TeacherFeatures, train: Indices, *others: Any) -> TrainedStudent:
        trained.append(len(train))
        return train_student(features, train, *others)

    monkeypatch.setattr(calibrate, "train_student", remember)
    scores = cross_validate_scores(features_of(recipe), recipe, [None] * recipe.fold_count(9))
    # Each fold has at least two images.
    assert sorted(trained) == {2: [4, 5], 3: [6, 6, 6], 12: [6, 7, 7, 7]}[folds]
    assert scores.shape == (9,)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("kind", ["student and memory", "memory"])
def test_fold_does_not_remember_the_images_it_scores(
    images: TrainingImages, features_of: FeaturesOf, kind: str
) -> None:
    """One image is unlike all others: if its fold's memory held it, it would score no higher than they do."""
    recipe = dataclasses.replace(MODELS[kind], memory=100_000, calibration_folds=3)
    pixels = images.pixels.copy()
    pixels[4] = (255, 0, 0)
    features, everything = features_of(recipe, unpadded(pixels)), np.arange(9)
    scores = cross_validate_scores(features, recipe, [None] * 3)
    assert scores[4] > 10 * max(*np.delete(scores, 4), 1)
    known, _, _ = calibrate_detector(fit_uncalibrated(features, everything, everything, recipe), features, everything)
    assert known[4] < 10 * max(*np.delete(known, 4), 1)


def test_p_values_of_normal_images_are_not_too_small(any_model: Recipe, features_of: FeaturesOf) -> None:
    """Calibrate on random images of different contrast, and score others of the same kind."""
    rng = np.random.default_rng(0)
    contrast = rng.lognormal(2.5, 0.5, (90, 1, 1, 1))
    images = unpadded(np.clip(120 + contrast * rng.normal(size=(90, 64, 64, 3)), 0, 255).astype(np.uint8))
    features = features_of(any_model, images)
    detector = fit_uncalibrated(features, np.arange(20), np.arange(20), any_model)
    p_values = []
    for _ in range(40):
        later = rng.permutation(np.arange(20, 90))
        calibrating, heatmap_scale, scales = calibrate_detector(detector, features, np.sort(later[:4]))
        maps = anomaly_maps(detector, select(images, later[4:34]), scales)
        scores = np.array([each.score(any_model.top_fraction) for each in maps], np.float32)
        p_values.append(Calibration(np.sort(calibrating), heatmap_scale).p_values(scores))
    for rate in (0.2, 0.4):
        alarms = (np.array(p_values) <= rate + 1e-6).mean(axis=1)
        assert alarms.mean() <= rate + 4 * alarms.std() / np.sqrt(len(alarms))


def test_patch_scores_above_normal_images(any_model: Recipe, features_of: FeaturesOf, rng: np.random.Generator) -> None:
    recipe = dataclasses.replace(any_model, teacher="demo", teacher_weights="", epochs=12)
    features = features_of(recipe)
    train, held_out = split_images(9, recipe)
    detector = fit_uncalibrated(features, train, held_out, recipe)
    _, _, scales = calibrate_detector(detector, features, held_out)
    normal = rng.integers(90, 130, (6, 64, 64, 3), dtype=np.uint8)
    odd = normal.copy()
    odd[:, 20:40, 20:40] = 250
    maps = anomaly_maps(detector, unpadded(np.concatenate([normal, odd])), scales)
    scores = np.array([each.score(recipe.top_fraction) for each in maps])
    assert scores[6:].min() > 2 * scores[:6].max()
