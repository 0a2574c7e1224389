from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from stpm.fitting import calibrate
from stpm.fitting.calibrate import calibrate_model, cross_validate_scores
from stpm.fitting.splits import Indices, split_images
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.train_student import TrainedStudent, train_student
from stpm.fitting.training_images import TrainingImages
from stpm.method.calibration import Calibration
from stpm.method.forward import Matcher
from stpm.method.recipe import Recipe
from tests.conftest import MODELS
from tests.fitting.helpers import BUDGET, MatcherOf, anomaly_maps, fit_parts, select, unpadded


@pytest.mark.parametrize("padded", [False, True])
def test_calibration_scores_held_out_images_as_scoring_does(
    images: TrainingImages, any_model: Recipe, make_matcher: MatcherOf, padded: bool
) -> None:
    """Score each held-out image on the part scales that the other held-out images give."""
    if padded:
        content = np.array([[0, 24, 64, 40], [8, 0, 56, 64], [0, 0, 64, 64]] * 3, "i4")
        images = dataclasses.replace(images, content=content)
    recipe = dataclasses.replace(any_model, held_out_fraction=0.5)
    features, matcher = TeacherFeatures(make_matcher(recipe), images, BUDGET), make_matcher(recipe)
    train, held_out = split_images(len(images), recipe)
    parts = fit_parts(features, train, held_out, recipe)
    found = calibrate_model(parts, features, held_out, recipe, BUDGET)
    maps_count = (3 if parts.student else 0) + len(parts.memory)
    assert len(found.distance_scales) == (maps_count if recipe.fusion == "quantile" else 0)
    maps = []
    for i in held_out:
        scales = calibrate_model(parts, features, held_out[held_out != i], recipe, BUDGET).distance_scales
        maps += anomaly_maps(matcher, parts, select(images, [i]), recipe, scales)
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
    images: TrainingImages, any_model: Recipe, make_matcher: MatcherOf, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if padded:
        content = np.array([[0, 24, 64, 40], [8, 0, 56, 64], [0, 0, 64, 64]] * 3, "i4")
        images = dataclasses.replace(images, content=content)
    features = TeacherFeatures(make_matcher(any_model), images, BUDGET)
    held_out = np.arange(9)
    parts = fit_parts(features, np.arange(9), held_out, any_model)
    monkeypatch.setattr(calibrate, "EVALUATION_BATCH_SIZE", 2)
    a_batch = calibrate.HeldOutDistances.compute(parts, features, held_out[:2], any_model, BUDGET).cached[0].nbytes
    computed: list[int] = []
    original = Matcher.distances

    def count(self: Matcher, *arguments: Any) -> Any:
        computed.append(len(arguments[-1]))
        return original(self, *arguments)

    monkeypatch.setattr(Matcher, "distances", count)
    found = []
    for budget, times in ((BUDGET, 5), (2 * a_batch, 8), (0, 10), (-1, 10)):
        computed.clear()
        found.append(calibrate_model(parts, features, held_out, any_model, budget))
        assert len(computed) == times
    for other in found[1:]:
        np.testing.assert_array_equal(other.scores, found[0].scores)
        assert other[1:] == found[0][1:]


def test_distance_scales_are_quantiles_on_held_out_images(
    images: TrainingImages, any_model: Recipe, make_matcher: MatcherOf
) -> None:
    recipe = dataclasses.replace(any_model, fusion="quantile")
    features, matcher = TeacherFeatures(make_matcher(recipe), images, BUDGET), make_matcher(recipe)
    held_out = np.array([1, 4, 8])
    parts = fit_parts(features, np.array([0, 2, 3, 5, 6, 7]), held_out, recipe)
    inputs = matcher.inputs(torch.from_numpy(images.pixels[held_out]))
    distances = matcher.distances(parts, inputs, images.content[held_out])
    scales = calibrate_model(parts, features, held_out, recipe, BUDGET).distance_scales
    for scale, part in zip(scales, distances.maps, strict=True):
        # Maps of this size are not sampled: all positions count.
        assert scale.low == pytest.approx(np.quantile(part.numpy(), 0.9, method="inverted_cdf"), rel=1e-3)
        assert scale.high == pytest.approx(np.quantile(part.numpy(), 0.995, method="inverted_cdf"), rel=1e-3)


@pytest.mark.parametrize("folds", [2, 3, 9, 12])
def test_cross_validation_scores_every_image_once(
    images: TrainingImages, any_model: Recipe, make_matcher: MatcherOf, folds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(any_model, calibration_folds=folds)
    trained: list[int] = []

    def remember(features: TeacherFeatures, train: Indices, *others: Any) -> TrainedStudent:
        trained.append(len(train))
        return train_student(features, train, *others)

    monkeypatch.setattr(calibrate, "train_student", remember)
    features, checkpoints = TeacherFeatures(make_matcher(recipe), images, BUDGET), [None] * recipe.fold_count(9)
    scores = cross_validate_scores(features, recipe, checkpoints, BUDGET)
    # Each fold has at least two images.
    assert sorted(trained) == {2: [4, 5], 3: [6, 6, 6]}.get(folds, [6, 7, 7, 7])
    assert scores.shape == (len(images),)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("kind", ["student and memory", "memory"])
def test_fold_does_not_remember_the_images_it_scores(
    images: TrainingImages, make_matcher: MatcherOf, kind: str
) -> None:
    """One image is unlike all others: if its fold's memory held it, it would score no higher than they do."""
    recipe = dataclasses.replace(MODELS[kind], memory=100_000, calibration_folds=3)
    pixels = images.pixels.copy()
    pixels[4] = (255, 0, 0)
    features = TeacherFeatures(make_matcher(recipe), unpadded(pixels), BUDGET)
    scores = cross_validate_scores(features, recipe, [None] * 3, BUDGET)
    assert scores[4] > 10 * max(*np.delete(scores, 4), 1)
    everything = np.arange(len(images))
    known = calibrate_model(fit_parts(features, everything, everything, recipe), features, everything, recipe, BUDGET)
    assert known.scores[4] < 10 * max(*np.delete(known.scores, 4), 1)


def test_p_values_of_normal_images_are_not_too_small(any_model: Recipe, make_matcher: MatcherOf) -> None:
    """Calibrate on random images of different contrast, and score others of the same kind."""
    rng = np.random.default_rng(0)
    contrast = rng.lognormal(2.5, 0.5, (90, 1, 1, 1))
    pixels = np.clip(120 + contrast * rng.normal(size=(90, 64, 64, 3)), 0, 255).astype(np.uint8)
    images = unpadded(pixels)
    features, matcher = TeacherFeatures(make_matcher(any_model), images, BUDGET), make_matcher(any_model)
    parts = fit_parts(features, np.arange(20), np.arange(20), any_model)
    p_values = []
    for _ in range(40):
        later = rng.permutation(np.arange(20, 90))
        found = calibrate_model(parts, features, np.sort(later[:4]), any_model, BUDGET)
        maps = anomaly_maps(matcher, parts, select(images, later[4:34]), any_model, found.distance_scales)
        scores = np.array([each.score(any_model.top_fraction).total for each in maps], np.float32)
        p_values.append(Calibration(np.sort(found.scores), found.heatmap_scale).p_values(scores))
    for rate in (0.2, 0.4):
        alarms = (np.array(p_values) <= rate + 1e-6).mean(axis=1)
        assert alarms.mean() <= rate + 4 * alarms.std() / np.sqrt(len(alarms))


def test_patch_scores_above_normal_images(
    images: TrainingImages, any_model: Recipe, make_matcher: MatcherOf, rng: np.random.Generator
) -> None:
    recipe = dataclasses.replace(any_model, teacher="demo", teacher_weights="", epochs=12)
    features = TeacherFeatures(make_matcher(recipe), images, BUDGET)
    train, held_out = split_images(len(images), recipe)
    parts = fit_parts(features, train, held_out, recipe)
    scales = calibrate_model(parts, features, held_out, recipe, BUDGET).distance_scales
    normal = rng.integers(90, 130, (6, 64, 64, 3), dtype=np.uint8)
    odd = normal.copy()
    odd[:, 20:40, 20:40] = 250
    maps = anomaly_maps(make_matcher(recipe), parts, unpadded(np.concatenate([normal, odd])), recipe, scales)
    scores = np.array([each.score(recipe.top_fraction).total for each in maps])
    assert scores[6:].min() > 2 * scores[:6].max()
