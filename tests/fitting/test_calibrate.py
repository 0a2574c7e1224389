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
from stpm.method.calibration import Calibration
from stpm.method.recipe import Recipe
from tests.conftest import MODELS
from tests.fitting.helpers import BUDGET, TeacherOf, anomaly_maps, fit_uncalibrated, select, unpadded


@pytest.mark.parametrize("padded", [False, True])
def test_calibration_scores_held_out_images_as_scoring_does(
    images: TrainingImages, any_model: Recipe, make_teacher: TeacherOf, padded: bool
) -> None:
    """Score each held-out image on the part scales that the other held-out images give."""
    if padded:
        content = np.array([[0, 24, 64, 40], [8, 0, 56, 64], [0, 0, 64, 64]] * 3, "i4")
        images = dataclasses.replace(images, content=content)
    recipe = dataclasses.replace(any_model, held_out_fraction=0.5)
    features = TeacherFeatures(make_teacher(recipe), images, BUDGET)
    train, held_out = split_images(len(images), recipe)
    detector = fit_uncalibrated(features, train, held_out, recipe)
    found = calibrate_detector(detector, features, held_out, BUDGET)
    maps_count = (3 if detector.student else 0) + len(detector.memory)
    assert len(found.distance_scales) == (maps_count if recipe.fusion == "quantile" else 0)
    maps = []
    for i in held_out:
        scales = calibrate_detector(detector, features, held_out[held_out != i], BUDGET).distance_scales
        maps += anomaly_maps(detector, select(images, [i]), scales)
    scores = [each.score(recipe.top_fraction).total for each in maps]
    np.testing.assert_allclose(found.scores, scores, rtol=1e-3, atol=1e-4)
    pixels = np.concatenate([each.total.ravel() for each in maps])
    assert found.heatmap_scale.low == pytest.approx(np.quantile(pixels, 0.99), rel=1e-3, abs=1e-4)
    assert found.heatmap_scale.good_max == pytest.approx(pixels.max(), rel=1e-3, abs=1e-4)
    assert [each.total.shape for each in maps] == [
        (bottom - top, right - left) for left, top, right, bottom in images.content[held_out].tolist()
    ]


@pytest.mark.parametrize("padded", [False, True])
def test_distances_over_the_budget_are_recomputed_to_the_same_bits(
    images: TrainingImages, any_model: Recipe, make_teacher: TeacherOf, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if padded:
        content = np.array([[0, 24, 64, 40], [8, 0, 56, 64], [0, 0, 64, 64]] * 3, "i4")
        images = dataclasses.replace(images, content=content)
    features = TeacherFeatures(make_teacher(any_model), images, BUDGET)
    held_out = np.arange(9)
    detector = fit_uncalibrated(features, np.arange(9), held_out, any_model)
    monkeypatch.setattr(calibrate, "EVALUATION_BATCH_SIZE", 2)
    a_batch = calibrate.HeldOutDistances.compute(detector, features, held_out[:2], BUDGET).cached[0].nbytes
    computed: list[int] = []
    original = Detector.distances

    def count(self: Detector, *arguments: Any) -> Any:
        computed.append(len(arguments[-1]))
        return original(self, *arguments)

    monkeypatch.setattr(Detector, "distances", count)
    found = []
    for budget, times in ((BUDGET, 5), (2 * a_batch, 8), (0, 10), (-1, 10)):
        computed.clear()
        found.append(calibrate_detector(detector, features, held_out, budget))
        assert len(computed) == times
    for other in found[1:]:
        np.testing.assert_array_equal(other.scores, found[0].scores)
        assert other[1:] == found[0][1:]


def test_distance_scales_are_quantiles_on_held_out_images(
    images: TrainingImages, any_model: Recipe, make_teacher: TeacherOf
) -> None:
    recipe = dataclasses.replace(any_model, fusion="quantile")
    features = TeacherFeatures(make_teacher(recipe), images, BUDGET)
    held_out = np.array([1, 4, 8])
    detector = fit_uncalibrated(features, np.array([0, 2, 3, 5, 6, 7]), held_out, recipe)
    inputs = detector.teacher.inputs(torch.from_numpy(images.pixels[held_out]))
    distances = detector.distances(inputs, images.content[held_out])
    scales = calibrate_detector(detector, features, held_out, BUDGET).distance_scales
    for scale, part in zip(scales, distances.maps, strict=True):
        # Maps of this size are not sampled: all positions count.
        assert scale.low == pytest.approx(np.quantile(part.numpy(), 0.9, method="inverted_cdf"), rel=1e-3)
        assert scale.high == pytest.approx(np.quantile(part.numpy(), 0.995, method="inverted_cdf"), rel=1e-3)


@pytest.mark.parametrize("folds", [2, 3, 9, 12])
def test_cross_validation_scores_every_image_once(
    images: TrainingImages, any_model: Recipe, make_teacher: TeacherOf, folds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(any_model, calibration_folds=folds)
    trained: list[int] = []

    def remember(features: TeacherFeatures, train: Indices, *others: Any) -> TrainedStudent:
        trained.append(len(train))
        return train_student(features, train, *others)

    monkeypatch.setattr(calibrate, "train_student", remember)
    features, checkpoints = TeacherFeatures(make_teacher(recipe), images, BUDGET), [None] * recipe.fold_count(9)
    scores = cross_validate_scores(features, recipe, checkpoints, BUDGET)
    # Each fold has at least two images.
    assert sorted(trained) == {2: [4, 5], 3: [6, 6, 6]}.get(folds, [6, 7, 7, 7])
    assert scores.shape == (len(images),)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("kind", ["student and memory", "memory"])
def test_fold_does_not_remember_the_images_it_scores(
    images: TrainingImages, make_teacher: TeacherOf, kind: str
) -> None:
    """One image is unlike all others: if its fold's memory held it, it would score no higher than they do."""
    recipe = dataclasses.replace(MODELS[kind], memory=100_000, calibration_folds=3)
    pixels = images.pixels.copy()
    pixels[4] = (255, 0, 0)
    features = TeacherFeatures(make_teacher(recipe), unpadded(pixels), BUDGET)
    scores = cross_validate_scores(features, recipe, [None] * 3, BUDGET)
    assert scores[4] > 10 * max(*np.delete(scores, 4), 1)
    everything = np.arange(len(images))
    detector = fit_uncalibrated(features, everything, everything, recipe)
    known = calibrate_detector(detector, features, everything, BUDGET)
    assert known.scores[4] < 10 * max(*np.delete(known.scores, 4), 1)


def test_p_values_of_normal_images_are_not_too_small(any_model: Recipe, make_teacher: TeacherOf) -> None:
    """Calibrate on random images of different contrast, and score others of the same kind."""
    rng = np.random.default_rng(0)
    contrast = rng.lognormal(2.5, 0.5, (90, 1, 1, 1))
    pixels = np.clip(120 + contrast * rng.normal(size=(90, 64, 64, 3)), 0, 255).astype(np.uint8)
    images = unpadded(pixels)
    features = TeacherFeatures(make_teacher(any_model), images, BUDGET)
    detector = fit_uncalibrated(features, np.arange(20), np.arange(20), any_model)
    p_values = []
    for _ in range(40):
        later = rng.permutation(np.arange(20, 90))
        found = calibrate_detector(detector, features, np.sort(later[:4]), BUDGET)
        maps = anomaly_maps(detector, select(images, later[4:34]), found.distance_scales)
        scores = np.array([each.score(any_model.top_fraction).total for each in maps], np.float32)
        p_values.append(Calibration(np.sort(found.scores), found.heatmap_scale).p_values(scores))
    for rate in (0.2, 0.4):
        alarms = (np.array(p_values) <= rate + 1e-6).mean(axis=1)
        assert alarms.mean() <= rate + 4 * alarms.std() / np.sqrt(len(alarms))


def test_patch_scores_above_normal_images(
    images: TrainingImages, any_model: Recipe, make_teacher: TeacherOf, rng: np.random.Generator
) -> None:
    recipe = dataclasses.replace(any_model, teacher="demo", teacher_weights="", epochs=12)
    features = TeacherFeatures(make_teacher(recipe), images, BUDGET)
    train, held_out = split_images(len(images), recipe)
    detector = fit_uncalibrated(features, train, held_out, recipe)
    scales = calibrate_detector(detector, features, held_out, BUDGET).distance_scales
    normal = rng.integers(90, 130, (6, 64, 64, 3), dtype=np.uint8)
    odd = normal.copy()
    odd[:, 20:40, 20:40] = 250
    maps = anomaly_maps(detector, unpadded(np.concatenate([normal, odd])), scales)
    scores = np.array([each.score(recipe.top_fraction).total for each in maps])
    assert scores[6:].min() > 2 * scores[:6].max()
