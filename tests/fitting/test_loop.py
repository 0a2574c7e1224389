from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stpm.errors import DataError
from stpm.fitting import loop
from stpm.fitting.features import TeacherFeatures
from stpm.fitting.held_out import calibrate_student, cross_fitted
from stpm.fitting.loop import DivergedError, Progress, fit, learning_rate, split
from stpm.fitting.task import Epoch
from stpm.fitting.training_images import TrainingImages
from stpm.forward import Matcher
from stpm.networks import architecture_of, trunk_from
from stpm.recipe import PRESETS, Recipe

PAPER = PRESETS["paper"]

MatcherOf = Callable[[Recipe], Matcher]
BUDGET = 2**30


def whole(pixels: np.ndarray) -> TrainingImages:
    """Images that fill the input."""
    content = np.array([[0, 0, pixels.shape[2], pixels.shape[1]]] * len(pixels), np.int32)
    return TrainingImages(pixels, content)


@pytest.fixture
def images(rng: np.random.Generator) -> TrainingImages:
    return whole(rng.integers(90, 130, (9, 64, 64, 3), dtype=np.uint8))


def fitted(
    images: TrainingImages,
    recipe: Recipe,
    matcher_of: MatcherOf,
    checkpoints: loop.Checkpoints | None = None,
    budget: int = BUDGET,
) -> tuple[loop.Fitted, list[Epoch]]:
    seen: list[Epoch] = []
    features = TeacherFeatures(matcher_of(recipe), images, budget)
    assert features.kept == (budget > 0)
    train, held_out = split(len(images), recipe)
    return fit(features, train, held_out, recipe, seen.append, checkpoints), seen


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@given(st.integers(2, 500), st.floats(0.01, 0.99), st.integers(0, 1000))
def test_a_split_is_a_partition_with_something_on_each_side(count: int, share: float, seed: int) -> None:
    train, held_out = split(count, dataclasses.replace(PAPER, validation_share=share, seed=seed))
    assert sorted([*train, *held_out]) == list(range(count))
    assert len(train) >= 1
    assert abs(len(held_out) - count * share) <= 1


def test_the_papers_split_is_80_to_20_and_depends_on_the_seed() -> None:
    assert tuple(map(len, split(209, PAPER))) == (167, 42)
    assert (split(209, PAPER)[1] != split(209, dataclasses.replace(PAPER, seed=1))[1]).any()


def test_one_image_is_too_few() -> None:
    with pytest.raises(DataError, match="1 defect-free image; at least 2"):
        split(1, PAPER)


def test_both_losses_are_told_for_every_epoch(images: TrainingImages, tiny: Recipe, matcher_of: MatcherOf) -> None:
    result, seen = fitted(images, tiny, matcher_of)
    assert [epoch.number for epoch in seen] == [1, 2]
    assert tuple(seen) == result.history
    assert all(0 < epoch.train_loss < 2 and 0 < epoch.validation_loss < 2 for epoch in seen)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_seed_decides_every_weight(preset: str, images: TrainingImages, tiny: Recipe, matcher_of: MatcherOf) -> None:
    ours = ("teacher", "teacher_weights", "size", "epochs", "precision", "validation_share")
    recipe = dataclasses.replace(PRESETS[preset], **{name: getattr(tiny, name) for name in ours})  # type: ignore[index]
    first, again = (fitted(images, recipe, matcher_of)[0] for _ in range(2))
    other = fitted(images, dataclasses.replace(recipe, seed=1), matcher_of)[0]
    assert same(first.student, again.student)
    assert [e.train_loss for e in first.history] == [e.train_loss for e in again.history]
    assert not same(first.student, other.student)


class InterruptedFitError(Exception):
    pass


class Memory:
    """Checkpoints after every epoch, and a death after the n-th."""

    def __init__(self, dies_after: int) -> None:
        self.progress: Progress | None = None
        self._left = dies_after

    def load(self) -> Progress | None:
        return self.progress

    def due(self, last: bool) -> bool:
        return True

    def save(self, progress: Progress) -> None:
        self.progress = progress
        self._left -= 1
        if not self._left:
            raise InterruptedFitError


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("dies_after", [1, 3])
def test_a_fit_that_was_interrupted_ends_with_the_same_bits(
    images: TrainingImages, tiny: Recipe, matcher_of: MatcherOf, optimiser: str, keep: str, dies_after: int
) -> None:
    recipe = dataclasses.replace(
        tiny, optimiser=optimiser, keep=keep, epochs=5, schedule="cosine", warmup_epochs=2, learning_rate=0.01
    )
    whole, _ = fitted(images, recipe, matcher_of)
    memory = Memory(dies_after)
    with pytest.raises(InterruptedFitError):
        fitted(images, recipe, matcher_of, memory)
    resumed, seen = fitted(images, recipe, matcher_of, memory)
    assert [epoch.number for epoch in seen] == list(range(dies_after + 1, 6))
    assert same(whole.student, resumed.student)
    assert whole.kept.number == resumed.kept.number
    losses = [[(e.train_loss, e.validation_loss) for e in of.history] for of in (whole, resumed)]
    assert losses[0] == losses[1]


def test_the_loss_falls(images: TrainingImages, tiny: Recipe, matcher_of: MatcherOf) -> None:
    recipe = dataclasses.replace(tiny, optimiser="adam", learning_rate=1e-3, loss_scale=1.0, epochs=20)
    history = fitted(images, recipe, matcher_of)[0].history
    assert history[-1].train_loss < 0.7 * history[0].train_loss


def test_the_epoch_that_is_kept(images: TrainingImages, tiny: Recipe, matcher_of: MatcherOf) -> None:
    for keep in ("best", "last"):
        recipe = dataclasses.replace(tiny, keep=keep, epochs=5)
        result, _ = fitted(images, recipe, matcher_of)
        best = min(result.history, key=lambda epoch: epoch.validation_loss)
        assert result.kept == (best if keep == "best" else result.history[-1])


def test_early_stopping_ends_when_the_validation_loss_no_longer_falls(
    images: TrainingImages, tiny: Recipe, matcher_of: MatcherOf
) -> None:
    recipe = dataclasses.replace(tiny, epochs=200, early_stopping=3, learning_rate=0.01)
    history = fitted(images, recipe, matcher_of)[0].history
    assert len(history) < 200
    best = min(history, key=lambda epoch: epoch.validation_loss).number
    assert history[-1].number == best + 3


def test_learning_rates() -> None:
    recipe = Recipe(epochs=10, learning_rate=1.0, warmup_epochs=2, schedule="cosine")
    rates = [learning_rate(recipe, step, 5) for step in range(50)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:], 0.5 * (1 + np.cos(np.pi * np.arange(40) / 40)))
    assert {learning_rate(Recipe(), step, 5) for step in range(500)} == {0.4}


def test_calibration_is_the_held_out_images_scored_by_the_kept_student(
    images: TrainingImages, tiny: Recipe, matcher_of: MatcherOf
) -> None:
    result, _ = fitted(images, tiny, matcher_of)
    matcher, held_out = matcher_of(tiny), split(len(images), tiny)[1]
    calibration, statistics = calibrate_student(result.student, matcher, images, held_out, tiny)
    student = trunk_from(tiny.teacher, tiny.levels, result.student, "test")
    maps = matcher.anomaly_maps(matcher.distances(student, images.pixels[held_out]), images.content[held_out], None)
    np.testing.assert_array_equal(calibration.scores, np.sort([each.max() for each in maps]))
    assert statistics is None


def test_calibrated_levels_need_three_held_out_images(
    images: TrainingImages, tiny: Recipe, matcher_of: MatcherOf
) -> None:
    recipe = dataclasses.replace(tiny, combine="calibrated")
    result, _ = fitted(images, recipe, matcher_of)
    matcher = matcher_of(recipe)
    with pytest.raises(DataError, match="2 held-out images; combine `calibrated` needs 3"):
        calibrate_student(result.student, matcher, images, np.arange(2), recipe)
    calibration, statistics = calibrate_student(result.student, matcher, images, np.arange(5), recipe)
    assert len(calibration.scores) == 5
    assert statistics
    assert len(statistics) == 3


def test_cross_fitted_scores_are_one_for_every_image(
    images: TrainingImages, tiny: Recipe, matcher_of: MatcherOf
) -> None:
    recipe = dataclasses.replace(tiny, calibration_folds=3)
    scores = cross_fitted(TeacherFeatures(matcher_of(recipe), images, BUDGET), recipe, [None] * 3)
    assert len(scores) == len(images)
    assert (np.diff(scores) >= 0).all()


def test_features_computed_anew_fit_the_same_student(
    images: TrainingImages, tiny: Recipe, matcher_of: MatcherOf
) -> None:
    kept, _ = fitted(images, tiny, matcher_of)
    anew, _ = fitted(images, tiny, matcher_of, budget=0)
    for first, second in zip(kept.history, anew.history, strict=True):
        # Kept features are rounded to half precision, nothing else differs.
        assert first.train_loss == pytest.approx(second.train_loss, rel=2e-2)


def test_the_last_smaller_batch_steps_as_far_as_its_mean_says(
    images: TrainingImages, tiny: Recipe, matcher_of: MatcherOf
) -> None:
    """The loss scale multiplies the mean of a batch, whatever its size: a batch twice over changes no gradient."""
    matcher = matcher_of(tiny)
    weights = fitted(images, tiny, matcher_of)[0].student
    gradients = []
    for batch in (images.pixels[:3], np.concatenate([images.pixels[:3], images.pixels[:3]])):
        student = trunk_from(tiny.teacher, tiny.levels, weights, "test")
        inputs = matcher.inputs(torch.from_numpy(batch))
        loss = loop.matching_loss(matcher.teacher_features(inputs), student(inputs)) * tiny.loss_scale
        loss.backward()
        gradients.append(next(student.parameters()).grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_a_loss_that_is_no_number_is_said(images: TrainingImages, tiny: Recipe, matcher_of: MatcherOf) -> None:
    recipe = dataclasses.replace(tiny, learning_rate=1e30, epochs=5)
    with pytest.raises(DivergedError, match=r"loss is nan in epoch .*; lower --learning-rate"):
        fitted(images, recipe, matcher_of)


def test_a_patch_scores_above_images_like_those_that_were_fitted(
    images: TrainingImages, tiny: Recipe, matcher_of: MatcherOf, rng: np.random.Generator
) -> None:
    recipe = dataclasses.replace(tiny, teacher="demo", teacher_weights="", epochs=12)
    result, _ = fitted(images, recipe, matcher_of)
    student = trunk_from(architecture_of(recipe.teacher), recipe.levels, result.student, "test")
    normal = rng.integers(90, 130, (6, 64, 64, 3), dtype=np.uint8)
    odd = normal.copy()
    odd[:, 20:40, 20:40] = 250
    matcher = matcher_of(recipe)
    both = whole(np.concatenate([normal, odd]))
    maps = matcher.anomaly_maps(matcher.distances(student, both.pixels), both.content, None)
    scores = np.array([each.max() for each in maps])
    assert scores[6:].min() > 2 * scores[:6].max()


def test_what_a_fit_learns_does_not_hang_on_the_width_of_the_padding(
    images: TrainingImages, tiny: Recipe, matcher_of: MatcherOf
) -> None:
    """Positions on padding have no part in the loss: replacing the teacher's features there changes nothing."""
    content = np.array([[0, 16, 64, 48], [0, 0, 64, 64], [20, 0, 44, 64]] * 3, np.int32)
    padded = TrainingImages(images.pixels, content)
    features = TeacherFeatures(matcher_of(tiny), padded, BUDGET)
    train, held_out = split(len(padded), tiny)
    before = fit(features, train, held_out, tiny, lambda epoch: None)
    masks = features.content_masks(torch.arange(len(padded)))
    assert masks
    for level, mask in zip(features._features, masks, strict=True):
        level[~mask[:, None].expand_as(level)] = 0.5
    after = fit(features, train, held_out, tiny, lambda epoch: None)
    assert same(before.student, after.student)
    assert TeacherFeatures(matcher_of(tiny), images, BUDGET).content_masks(torch.arange(9)) is None


def test_held_out_images_are_calibrated_on_what_they_show(
    images: TrainingImages, tiny: Recipe, matcher_of: MatcherOf
) -> None:
    matcher = matcher_of(tiny)
    student = fitted(images, tiny, matcher_of)[0].student
    content = np.array([[0, 24, 64, 40]] * 9, np.int32)
    calibration, _ = calibrate_student(student, matcher, TrainingImages(images.pixels, content), np.arange(9), tiny)
    distances = matcher.distances(trunk_from(tiny.teacher, tiny.levels, student, "test"), images.pixels)
    maps = matcher.anomaly_maps(distances, content, None)
    assert {each.shape for each in maps} == {(16, 64)}
    np.testing.assert_allclose(calibration.scores, np.sort([each.max() for each in maps]), rtol=1e-5)
    assert calibration.scale.low == pytest.approx(np.quantile(np.stack(maps), 0.99), rel=1e-5)
