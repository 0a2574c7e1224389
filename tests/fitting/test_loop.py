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
from stpm.fitting.loop import DivergedError, Epoch, fit, split
from stpm.forward import Matcher
from stpm.networks import architecture_of, trunk_from
from stpm.recipe import PRESETS, Recipe

MatcherOf = Callable[[Recipe], Matcher]


@pytest.fixture
def images(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(90, 130, (9, 64, 64, 3), dtype=np.uint8)


def fitted(images: np.ndarray, recipe: Recipe, matcher_of: MatcherOf) -> tuple[loop.Fitted, list[Epoch]]:
    seen: list[Epoch] = []
    return fit(images, matcher_of(recipe), recipe, seen.append), seen


@given(st.integers(2, 500), st.floats(0.01, 0.99), st.integers(0, 1000))
def test_a_split_is_a_partition_with_something_on_each_side(count: int, share: float, seed: int) -> None:
    train, held_out = split(count, share, seed)
    assert sorted([*train, *held_out]) == list(range(count))
    assert len(train) >= 1
    assert abs(len(held_out) - count * share) <= 1


def test_the_papers_split_is_80_to_20_and_depends_on_the_seed() -> None:
    assert tuple(map(len, split(209, 0.2, 0))) == (167, 42)
    assert (split(209, 0.2, 0)[1] != split(209, 0.2, 1)[1]).any()


def test_one_image_is_too_few() -> None:
    with pytest.raises(DataError, match="1 defect-free image; at least 2"):
        split(1, 0.2, 0)


def test_both_losses_are_told_for_every_epoch(images: np.ndarray, tiny: Recipe, matcher_of: MatcherOf) -> None:
    result, seen = fitted(images, tiny, matcher_of)
    assert [epoch.number for epoch in seen] == [1, 2]
    assert tuple(seen) == result.history
    assert all(0 < epoch.train_loss < 2 and 0 < epoch.validation_loss < 2 for epoch in seen)
    assert (result.train_count, result.validation_count) == (7, 2)


@pytest.mark.parametrize("preset", ["paper", "notebook"])
def test_a_seed_decides_every_weight(preset: str, images: np.ndarray, tiny: Recipe, matcher_of: MatcherOf) -> None:
    ours = ("teacher", "teacher_weights", "size", "epochs", "precision", "validation_share")
    recipe = dataclasses.replace(PRESETS[preset], **{name: getattr(tiny, name) for name in ours})  # type: ignore[index]
    first, again = (fitted(images, recipe, matcher_of)[0] for _ in range(2))
    other = fitted(images, dataclasses.replace(recipe, seed=1), matcher_of)[0]
    assert all(torch.equal(first.student[k], again.student[k]) for k in first.student)
    assert [e.train_loss for e in first.history] == [e.train_loss for e in again.history]
    assert any(not torch.equal(first.student[k], other.student[k]) for k in first.student)


def test_the_loss_falls(images: np.ndarray, tiny: Recipe, matcher_of: MatcherOf) -> None:
    recipe = dataclasses.replace(tiny, optimiser="adam", learning_rate=1e-3, loss_scale=1.0, epochs=20)
    history = fitted(images, recipe, matcher_of)[0].history
    assert history[-1].train_loss < 0.7 * history[0].train_loss


def test_the_epoch_that_is_kept(images: np.ndarray, tiny: Recipe, matcher_of: MatcherOf) -> None:
    for keep in ("best", "last"):
        recipe = dataclasses.replace(tiny, keep=keep, epochs=5)
        result, _ = fitted(images, recipe, matcher_of)
        best = min(result.history, key=lambda epoch: epoch.validation_loss)
        assert result.kept == (best if keep == "best" else result.history[-1])


def test_calibration_is_the_held_out_images_scored_by_the_kept_student(
    images: np.ndarray, tiny: Recipe, matcher_of: MatcherOf
) -> None:
    result, _ = fitted(images, tiny, matcher_of)
    student = trunk_from(tiny.teacher, tiny.levels, result.student, "test")
    held_out = split(len(images), tiny.validation_share, tiny.seed)[1]
    maps = matcher_of(tiny).anomaly_maps(student, images[held_out])
    np.testing.assert_array_equal(result.calibration.scores, np.sort(maps.max(axis=(1, 2))))


def test_features_computed_anew_fit_the_same_student(
    images: np.ndarray, tiny: Recipe, matcher_of: MatcherOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, _ = fitted(images, tiny, matcher_of)
    monkeypatch.setattr(loop, "_FEATURE_BUDGET", 0)
    anew, _ = fitted(images, tiny, matcher_of)
    for first, second in zip(kept.history, anew.history, strict=True):
        # Kept features are rounded to half precision, nothing else differs.
        assert first.train_loss == pytest.approx(second.train_loss, rel=2e-2)


def test_the_last_smaller_batch_steps_as_far_as_its_mean_says(
    images: np.ndarray, tiny: Recipe, matcher_of: MatcherOf
) -> None:
    """The loss scale multiplies the mean of a batch, whatever its size: a batch twice over changes no gradient."""
    recipe = dataclasses.replace(tiny, batch=64, epochs=1, validation_share=0.12)
    matcher = matcher_of(recipe)
    gradients = []
    for batch in (images[:3], np.concatenate([images[:3], images[:3]])):
        student = trunk_from(recipe.teacher, recipe.levels, fitted(images, recipe, matcher_of)[0].student, "test")
        inputs = matcher.inputs(torch.from_numpy(batch))
        loss = loop.matching_loss(matcher.teacher_features(inputs), student(inputs)) * recipe.loss_scale
        loss.backward()
        gradients.append(next(student.parameters()).grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_a_loss_that_is_no_number_is_said(images: np.ndarray, tiny: Recipe, matcher_of: MatcherOf) -> None:
    recipe = dataclasses.replace(tiny, learning_rate=1e30, epochs=5)
    with pytest.raises(DivergedError, match=r"loss is nan in epoch .*; lower --learning-rate"):
        fitted(images, recipe, matcher_of)


def test_a_patch_scores_above_images_like_those_that_were_fitted(
    images: np.ndarray, tiny: Recipe, matcher_of: MatcherOf, rng: np.random.Generator
) -> None:
    recipe = dataclasses.replace(tiny, teacher="demo", teacher_weights="", epochs=12)
    result, _ = fitted(images, recipe, matcher_of)
    student = trunk_from(architecture_of(recipe.teacher), recipe.levels, result.student, "test")
    normal = rng.integers(90, 130, (6, 64, 64, 3), dtype=np.uint8)
    odd = normal.copy()
    odd[:, 20:40, 20:40] = 250
    scores = matcher_of(recipe).anomaly_maps(student, np.concatenate([normal, odd])).max(axis=(1, 2))
    assert scores[6:].min() > 2 * scores[:6].max()
