from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from stpm.errors import ConfigError, DivergedError
from stpm.fitting.splits import split_images
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.train_student import FitState, learning_rate, train_student
from stpm.fitting.training_images import TrainingImages
from stpm.method.backbones import load_backbone
from stpm.method.matching import matching_loss
from stpm.method.recipe import PRESETS, Recipe
from stpm.options import Integers, Size
from tests.conftest import MODELS
from tests.fitting.helpers import BUDGET, TeacherOf, same_tensors, train_on, unpadded

PAPER = PRESETS["paper"]


def test_both_losses_are_reported_for_every_epoch(
    images: TrainingImages, tiny: Recipe, make_teacher: TeacherOf
) -> None:
    result, seen = train_on(images, tiny, make_teacher)
    assert [epoch.number for epoch in seen] == [1, 2]
    assert tuple(seen) == result.history
    assert all(0 < epoch.train_loss < 2 and 0 < epoch.validation_loss < 2 for epoch in seen)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_seed_decides_every_weight(preset: str, images: TrainingImages, tiny: Recipe, make_teacher: TeacherOf) -> None:
    ours = ("teacher", "teacher_weights", "size", "epochs", "precision", "held_out_fraction")
    recipe = dataclasses.replace(PRESETS[preset], **{name: getattr(tiny, name) for name in ours})  # type: ignore[index]
    first, again = (train_on(images, recipe, make_teacher)[0] for _ in range(2))
    other = train_on(images, dataclasses.replace(recipe, seed=1), make_teacher)[0]
    assert same_tensors(first.student, again.student)
    assert [e.train_loss for e in first.history] == [e.train_loss for e in again.history]
    assert not same_tensors(first.student, other.student)


class InterruptedTrainingError(Exception):
    pass


class InMemoryCheckpoints:
    """Save after every epoch, and raise an error after the n-th."""

    def __init__(self, dies_after: int) -> None:
        self.state: FitState | None = None
        self._left = dies_after

    def load(self) -> FitState | None:
        return self.state

    def is_due(self, training_ended: bool) -> bool:
        return True

    def save(self, state: FitState) -> None:
        self.state = state
        self._left -= 1
        if not self._left:
            raise InterruptedTrainingError


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("dies_after", [1, 3])
def test_interrupted_training_ends_with_the_same_bits(
    images: TrainingImages, tiny: Recipe, make_teacher: TeacherOf, optimiser: str, keep: str, dies_after: int
) -> None:
    recipe = dataclasses.replace(
        tiny, optimiser=optimiser, keep=keep, epochs=5, schedule="cosine", warmup_epochs=2, learning_rate=0.01
    )
    uninterrupted, _ = train_on(images, recipe, make_teacher)
    checkpoints = InMemoryCheckpoints(dies_after)
    with pytest.raises(InterruptedTrainingError):
        train_on(images, recipe, make_teacher, checkpoints)
    resumed, seen = train_on(images, recipe, make_teacher, checkpoints)
    assert [epoch.number for epoch in seen] == list(range(dies_after + 1, 6))
    assert same_tensors(uninterrupted.student, resumed.student)
    assert uninterrupted.kept_epoch.number == resumed.kept_epoch.number
    losses = [[(e.train_loss, e.validation_loss) for e in result.history] for result in (uninterrupted, resumed)]
    assert losses[0] == losses[1]


def test_loss_falls(images: TrainingImages, tiny: Recipe, make_teacher: TeacherOf) -> None:
    recipe = dataclasses.replace(tiny, optimiser="adam", learning_rate=1e-3, loss_factor=1.0, epochs=20)
    history = train_on(images, recipe, make_teacher)[0].history
    assert history[-1].train_loss < 0.7 * history[0].train_loss


def test_best_or_last_epoch_is_kept(images: TrainingImages, tiny: Recipe, make_teacher: TeacherOf) -> None:
    for keep in ("best", "last"):
        recipe = dataclasses.replace(tiny, keep=keep, epochs=5)
        result, _ = train_on(images, recipe, make_teacher)
        best = min(result.history, key=lambda epoch: epoch.validation_loss)
        assert result.kept_epoch == (best if keep == "best" else result.history[-1])


def test_early_stopping_ends_when_validation_loss_stops_falling(
    images: TrainingImages, tiny: Recipe, make_teacher: TeacherOf
) -> None:
    recipe = dataclasses.replace(tiny, epochs=200, early_stopping=3, learning_rate=0.01)
    history = train_on(images, recipe, make_teacher)[0].history
    assert len(history) < 200
    best = min(history, key=lambda epoch: epoch.validation_loss).number
    assert history[-1].number == best + 3


def test_learning_rate_warms_up_and_decays() -> None:
    recipe = Recipe(epochs=10, learning_rate=1.0, warmup_epochs=2, schedule="cosine")
    rates = [learning_rate(recipe, step, 5) for step in range(50)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:], 0.5 * (1 + np.cos(np.pi * np.arange(40) / 40)))
    assert {learning_rate(Recipe(), step, 5) for step in range(500)} == {0.4}


def test_recipe_without_student_trains_nothing(images: TrainingImages, make_teacher: TeacherOf) -> None:
    result, seen = train_on(images, MODELS["memory"], make_teacher)
    assert (result.student, result.history, result.kept_epoch, seen) == (None, (), None, [])


def test_recomputed_features_give_about_the_same_losses(
    images: TrainingImages, tiny: Recipe, make_teacher: TeacherOf
) -> None:
    cached, _ = train_on(images, tiny, make_teacher)
    recomputed, _ = train_on(images, tiny, make_teacher, budget=0)
    for first, second in zip(cached.history, recomputed.history, strict=True):
        # They differ only in that cached features are rounded to half precision.
        assert first.train_loss == pytest.approx(second.train_loss, rel=2e-2)


def test_gradient_does_not_depend_on_the_batch_size(
    images: TrainingImages, tiny: Recipe, make_teacher: TeacherOf
) -> None:
    """`loss_factor` multiplies the mean over a batch, so a batch with each image twice has the same gradient."""
    teacher = make_teacher(tiny)
    weights = train_on(images, tiny, make_teacher)[0].student
    gradients = []
    for batch in (images.pixels[:3], np.concatenate([images.pixels[:3], images.pixels[:3]])):
        student = load_backbone(tiny.teacher, tiny.levels, weights, "test")
        inputs = teacher.inputs(torch.from_numpy(batch))
        loss = matching_loss(teacher(inputs), student(inputs), [None] * 3) * tiny.loss_factor
        loss.backward()
        gradients.append(next(student.parameters()).grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_a_level_with_a_single_position_is_refused(
    images: TrainingImages, tiny: Recipe, make_teacher: TeacherOf
) -> None:
    small = unpadded(images.pixels[:, ::2, ::2])
    recipe = dataclasses.replace(tiny, size=Size("32"), levels=Integers((1, 2, 3, 4)))
    with pytest.raises(ConfigError, match="level 4 of test_resnet has a single position at an input of 32x32; give"):
        train_on(small, recipe, make_teacher)


def test_nan_loss_is_reported(images: TrainingImages, tiny: Recipe, make_teacher: TeacherOf) -> None:
    recipe = dataclasses.replace(tiny, learning_rate=1e30, epochs=5)
    message = r"training loss is \S+ and validation loss nan in epoch \d+; lower --learning-rate"
    with pytest.raises(DivergedError, match=message):
        train_on(images, recipe, make_teacher)


def test_student_does_not_learn_from_padding(images: TrainingImages, tiny: Recipe, make_teacher: TeacherOf) -> None:
    """Replace the teacher's features on padding: the student stays the same."""
    content = np.array([[0, 16, 64, 48], [0, 0, 64, 64], [20, 0, 44, 64]] * 3, np.int32)
    padded = dataclasses.replace(images, content=content)
    features = TeacherFeatures(make_teacher(tiny), padded, BUDGET)
    train, held_out = split_images(len(padded), tiny)
    before = train_student(features, train, held_out, tiny, lambda epoch: None)
    masks = features.content_masks(np.arange(len(padded)))
    for level, mask in zip(features._features, masks, strict=True):
        assert mask is not None
        level[~mask[:, None].expand_as(level)] = 0.5
    after = train_student(features, train, held_out, tiny, lambda epoch: None)
    assert same_tensors(before.student, after.student)
    assert TeacherFeatures(make_teacher(tiny), images, BUDGET).content_masks(np.arange(9)) == [None] * 3
