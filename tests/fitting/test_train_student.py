from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stpm.fitting import calibrate as calibrating
from stpm.fitting import coreset as building
from stpm.fitting import train_student as loop
from stpm.fitting.calibrate import calibrate_model, k_fold_scores, make_parts
from stpm.fitting.coreset import build_memory
from stpm.fitting.task import Epoch
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.train_student import DivergedError, Indices, Progress, fit, learning_rate, split
from stpm.fitting.training_images import TrainingImages
from stpm.method.backbones import load_backbone
from stpm.method.calibration import PartScale
from stpm.method.forward import Matcher, Parts
from stpm.method.fusion import AnomalyMap
from stpm.method.memory_bank import MemoryBank
from stpm.method.recipe import PRESETS, Recipe
from tests.conftest import MODELS

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
    train, held_out = split(count, dataclasses.replace(PAPER, validation_fraction=share, seed=seed))
    assert sorted([*train, *held_out]) == list(range(count))
    assert len(train) >= 1
    assert abs(len(held_out) - count * share) <= 1


def test_the_papers_split_is_80_to_20_and_depends_on_the_seed() -> None:
    assert tuple(map(len, split(209, PAPER))) == (167, 42)
    assert (split(209, PAPER)[1] != split(209, dataclasses.replace(PAPER, seed=1))[1]).any()


def test_both_losses_are_told_for_every_epoch(images: TrainingImages, tiny: Recipe, matcher_of: MatcherOf) -> None:
    result, seen = fitted(images, tiny, matcher_of)
    assert [epoch.number for epoch in seen] == [1, 2]
    assert tuple(seen) == result.history
    assert all(0 < epoch.train_loss < 2 and 0 < epoch.validation_loss < 2 for epoch in seen)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_seed_decides_every_weight(preset: str, images: TrainingImages, tiny: Recipe, matcher_of: MatcherOf) -> None:
    ours = ("teacher", "teacher_weights", "size", "epochs", "precision", "validation_fraction")
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
    recipe = dataclasses.replace(tiny, optimiser="adam", learning_rate=1e-3, loss_factor=1.0, epochs=20)
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


def parts_of(features: TeacherFeatures, train: Indices, held_out: Indices, recipe: Recipe) -> Parts:
    student = fit(features, train, held_out, recipe, lambda epoch: None).student
    return make_parts(student, build_memory(features, train, recipe), recipe, torch.device("cpu"))


def anomaly_maps(
    matcher: Matcher, parts: Parts, images: TrainingImages, recipe: Recipe, scales: Sequence[PartScale]
) -> list[AnomalyMap]:
    """Of all images, as scoring makes them."""
    inputs = matcher.inputs(torch.from_numpy(images.pixels))
    with torch.inference_mode():
        distances = matcher.distances(parts, matcher.teacher_features(inputs), inputs, images.content)
        return matcher.anomaly_maps(distances, images.content, recipe, scales)


def chosen(images: TrainingImages, indices: Sequence[int] | Indices) -> TrainingImages:
    return TrainingImages(images.pixels[list(indices)], images.content[list(indices)])


def test_a_model_without_a_student_is_not_trained(images: TrainingImages, matcher_of: MatcherOf) -> None:
    result, seen = fitted(images, MODELS["memory"], matcher_of)
    assert (result.student, result.history, result.kept, seen) == (None, (), None, [])


@pytest.mark.parametrize("padded", [False, True])
def test_calibration_is_the_held_out_images_scored_as_any_other(
    images: TrainingImages, any_model: Recipe, matcher_of: MatcherOf, padded: bool
) -> None:
    """Each on the scales that all held-out images but itself give."""
    if padded:
        images = TrainingImages(images.pixels, np.array([[0, 24, 64, 40], [8, 0, 56, 64], [0, 0, 64, 64]] * 3, "i4"))
    recipe = dataclasses.replace(any_model, validation_fraction=0.5)
    features, matcher = TeacherFeatures(matcher_of(recipe), images, BUDGET), matcher_of(recipe)
    train, held_out = split(len(images), recipe)
    parts = parts_of(features, train, held_out, recipe)
    found = calibrate_model(parts, features, held_out, recipe, BUDGET)
    assert len(found.scales) == (3 if parts.student else 0) + len(parts.memory)
    maps = []
    for i in held_out:
        scales = calibrate_model(parts, features, held_out[held_out != i], recipe, BUDGET).scales
        maps += anomaly_maps(matcher, parts, chosen(images, [i]), recipe, scales)
    scores = [each.score(recipe.top_fraction).total for each in maps]
    np.testing.assert_allclose(found.calibration.scores, np.sort(scores), rtol=1e-3, atol=1e-4)
    pixels = np.concatenate([each.total.ravel() for each in maps])
    assert found.calibration.scale.low == pytest.approx(np.quantile(pixels, 0.99), rel=1e-3, abs=1e-4)
    assert found.calibration.scale.normal_max == pytest.approx(pixels.max(), rel=1e-3, abs=1e-4)
    assert [each.total.shape for each in maps] == [
        (bottom - top, right - left) for left, top, right, bottom in images.content[held_out].tolist()
    ]


@pytest.mark.parametrize("padded", [False, True])
def test_distances_that_do_not_fit_are_computed_anew_to_the_same_bits(
    images: TrainingImages, any_model: Recipe, matcher_of: MatcherOf, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if padded:
        images = TrainingImages(images.pixels, np.array([[0, 24, 64, 40], [8, 0, 56, 64], [0, 0, 64, 64]] * 3, "i4"))
    features = TeacherFeatures(matcher_of(any_model), images, BUDGET)
    held_out = np.arange(9)
    parts = parts_of(features, np.arange(9), held_out, any_model)
    monkeypatch.setattr(calibrating, "EVALUATION_BATCH", 2)
    a_batch = calibrating.HeldOut(parts, features, held_out[:2], any_model, BUDGET)._kept[0].nbytes
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
        np.testing.assert_array_equal(other.calibration.scores, found[0].calibration.scores)
        assert (other.scales, other.calibration.scale) == (found[0].scales, found[0].calibration.scale)


def test_the_scales_of_parts_are_quantiles_of_what_held_out_images_show(
    images: TrainingImages, any_model: Recipe, matcher_of: MatcherOf
) -> None:
    features, matcher = TeacherFeatures(matcher_of(any_model), images, BUDGET), matcher_of(any_model)
    held_out = np.array([1, 4, 8])
    parts = parts_of(features, np.array([0, 2, 3, 5, 6, 7]), held_out, any_model)
    inputs = matcher.inputs(torch.from_numpy(images.pixels[held_out]))
    distances = matcher.distances(parts, matcher.teacher_features(inputs), inputs, images.content[held_out])
    scales = calibrate_model(parts, features, held_out, any_model, BUDGET).scales
    for scale, part in zip(scales, distances.maps, strict=True):
        # Of this size all positions are looked at.
        assert scale.low == pytest.approx(np.quantile(part.numpy(), 0.9, method="inverted_cdf"), rel=1e-3)
        assert scale.high == pytest.approx(np.quantile(part.numpy(), 0.995, method="inverted_cdf"), rel=1e-3)


def test_images_may_be_scored_alone_or_together(
    images: TrainingImages, any_model: Recipe, matcher_of: MatcherOf
) -> None:
    features, matcher = TeacherFeatures(matcher_of(any_model), images, BUDGET), matcher_of(any_model)
    train, held_out = split(len(images), any_model)
    parts = parts_of(features, train, held_out, any_model)
    scales = calibrate_model(parts, features, held_out, any_model, BUDGET).scales
    together = anomaly_maps(matcher, parts, images, any_model, scales)
    for i, each in enumerate(together):
        (alone,) = anomaly_maps(matcher, parts, chosen(images, [i]), any_model, scales)
        np.testing.assert_allclose(each.total, alone.total, rtol=1e-3, atol=1e-3)
        assert (each.student is None) == (not parts.student or any_model.fusion == "product")
        assert (each.memory is None) == (not parts.memory)
        if each.student is not None and each.memory is not None:
            np.testing.assert_allclose(each.student + each.memory, each.total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("folds", [2, 3, 9, 12])
def test_scores_of_folds_are_one_for_every_image(
    images: TrainingImages, any_model: Recipe, matcher_of: MatcherOf, folds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(any_model, calibration_folds=folds)
    trained: list[int] = []

    def remember(features: TeacherFeatures, train: Indices, *others: Any) -> loop.Fitted:
        trained.append(len(train))
        return fit(features, train, *others)

    monkeypatch.setattr(calibrating, "fit", remember)
    scores = k_fold_scores(TeacherFeatures(matcher_of(recipe), images, BUDGET), recipe, [None] * folds, BUDGET)
    # No image is alone in its fold.
    assert sorted(trained) == {2: [4, 5], 3: [6, 6, 6]}.get(folds, [6, 7, 7, 7])
    assert scores.shape == (len(images),)
    assert np.isfinite(scores).all()
    assert (np.diff(scores) >= 0).all()


@pytest.mark.parametrize("kind", ["student and memory", "memory"])
def test_no_fold_remembers_what_it_scores(images: TrainingImages, matcher_of: MatcherOf, kind: str) -> None:
    """One image is like no other: if all were remembered, it would score no higher than others."""
    recipe = dataclasses.replace(MODELS[kind], memory=100_000, calibration_folds=3)
    pixels = images.pixels.copy()
    pixels[4] = (255, 0, 0)
    features = TeacherFeatures(matcher_of(recipe), whole(pixels), BUDGET)
    scores = k_fold_scores(features, recipe, [None] * 3, BUDGET)
    assert scores[-1] > 10 * max(scores[-2], 1)
    everything = np.arange(len(images))
    known = calibrate_model(parts_of(features, everything, everything, recipe), features, everything, recipe, BUDGET)
    assert known.calibration.scores[-1] < 10 * max(known.calibration.scores[-2], 1)


def test_p_values_of_normal_images_are_not_too_small(any_model: Recipe, matcher_of: MatcherOf) -> None:
    """The whole way on images that differ in contrast, of which some are held out and others come later, by chance."""
    rng = np.random.default_rng(0)
    contrast = rng.lognormal(2.5, 0.5, (90, 1, 1, 1))
    pixels = np.clip(120 + contrast * rng.normal(size=(90, 64, 64, 3)), 0, 255).astype(np.uint8)
    images = whole(pixels)
    features, matcher = TeacherFeatures(matcher_of(any_model), images, BUDGET), matcher_of(any_model)
    parts = parts_of(features, np.arange(20), np.arange(20), any_model)
    p_values = []
    for _ in range(40):
        later = rng.permutation(np.arange(20, 90))
        found = calibrate_model(parts, features, np.sort(later[:4]), any_model, BUDGET)
        maps = anomaly_maps(matcher, parts, chosen(images, later[4:34]), any_model, found.scales)
        scores = np.array([each.score(any_model.top_fraction).total for each in maps], np.float32)
        p_values.append(found.calibration.p_values(scores))
    for rate in (0.2, 0.4):
        alarms = (np.array(p_values) <= rate + 1e-6).mean(axis=1)
        assert alarms.mean() <= rate + 4 * alarms.std() / np.sqrt(len(alarms))


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
        student = load_backbone(tiny.teacher, tiny.levels, weights, "test")
        inputs = matcher.inputs(torch.from_numpy(batch))
        loss = loop.matching_loss(matcher.teacher_features(inputs), student(inputs), [None] * 3) * tiny.loss_factor
        loss.backward()
        gradients.append(next(student.parameters()).grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_a_loss_that_is_no_number_is_said(images: TrainingImages, tiny: Recipe, matcher_of: MatcherOf) -> None:
    recipe = dataclasses.replace(tiny, learning_rate=1e30, epochs=5)
    with pytest.raises(DivergedError, match=r"loss is nan in epoch .*; lower --learning-rate"):
        fitted(images, recipe, matcher_of)


def test_a_patch_scores_above_images_like_those_that_were_fitted(
    images: TrainingImages, any_model: Recipe, matcher_of: MatcherOf, rng: np.random.Generator
) -> None:
    recipe = dataclasses.replace(any_model, teacher="demo", teacher_weights="", epochs=12)
    features = TeacherFeatures(matcher_of(recipe), images, BUDGET)
    train, held_out = split(len(images), recipe)
    parts = parts_of(features, train, held_out, recipe)
    scales = calibrate_model(parts, features, held_out, recipe, BUDGET).scales
    normal = rng.integers(90, 130, (6, 64, 64, 3), dtype=np.uint8)
    odd = normal.copy()
    odd[:, 20:40, 20:40] = 250
    maps = anomaly_maps(matcher_of(recipe), parts, whole(np.concatenate([normal, odd])), recipe, scales)
    scores = np.array([each.score(recipe.top_fraction).total for each in maps])
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
    for level, mask in zip(features._features, masks, strict=True):
        assert mask is not None
        level[~mask[:, None].expand_as(level)] = 0.5
    after = fit(features, train, held_out, tiny, lambda epoch: None)
    assert same(before.student, after.student)
    assert TeacherFeatures(matcher_of(tiny), images, BUDGET).content_masks(torch.arange(9)) == [None] * 3


def same_banks(first: tuple[MemoryBank, ...], second: tuple[MemoryBank, ...]) -> bool:
    return len(first) == len(second) and all(
        (a.level, a.kind, a.window) == (b.level, b.kind, b.window)
        and all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("mean", "whitening", "vectors"))
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("budget", [BUDGET, 0])
def test_the_same_images_give_the_same_memory(images: TrainingImages, matcher_of: MatcherOf, budget: int) -> None:
    recipe = MODELS["memory"]
    train, _ = split(len(images), recipe)
    first, again, other = (
        build_memory(TeacherFeatures(matcher_of(recipe), images, budget), train, dataclasses.replace(recipe, seed=seed))
        for seed in (0, 0, 1)
    )
    assert [(bank.level, bank.kind) for bank in first] == [
        (1, "features"),
        (1, "directions"),
        (2, "features"),
        (2, "directions"),
    ]
    assert [bank.window for bank in first] == [3, 3, 1, 1]
    # The coarsest level has 16 positions on each of 7 images.
    assert [len(bank.vectors) for bank in first] == [50] * 4
    assert same_banks(first, again)
    assert not same_banks(first, other)
    assert build_memory(TeacherFeatures(matcher_of(recipe), images, budget), train, MODELS["student"]) == ()


def test_features_computed_anew_give_about_the_same_memory(images: TrainingImages, matcher_of: MatcherOf) -> None:
    """Kept features are rounded to half precision, nothing else differs; all are remembered, for a choice may flip."""
    recipe = dataclasses.replace(MODELS["memory"], memory=100_000)
    features = [TeacherFeatures(matcher_of(recipe), images, budget) for budget in (BUDGET, 0)]
    kept, anew = (build_memory(each, np.arange(6), recipe) for each in features)
    levels, masks = features[1](torch.arange(6, 9)), [None] * 3
    for one, other in zip(kept, anew, strict=True):
        torch.testing.assert_close(one.mean, other.mean, rtol=2e-3, atol=1e-4)
        distances = [bank.distance_map(levels[bank.level], masks[bank.level]) for bank in (one, other)]
        torch.testing.assert_close(*distances, rtol=2e-2, atol=1e-2)


def test_only_images_to_train_on_are_remembered(images: TrainingImages, matcher_of: MatcherOf) -> None:
    recipe = dataclasses.replace(MODELS["memory"], memory=100_000)
    pixels = images.pixels.copy()
    pixels[[2, 5]] = (255, 0, 0)
    features = TeacherFeatures(matcher_of(recipe), whole(pixels), BUDGET)
    train = np.array([0, 1, 3, 4, 6, 7, 8])
    odd = features(torch.tensor([2, 5]))
    for bank, with_it in zip(
        build_memory(features, train, recipe), build_memory(features, np.append(train, 2), recipe), strict=True
    ):
        assert with_it.distance_map(odd[bank.level]).max() < 0.05
        known = bank.distance_map(features(torch.from_numpy(train))[bank.level])
        assert known.max() < 0.05
        assert bank.distance_map(odd[bank.level]).min() > 20 * known.max()


def test_padding_is_not_remembered(images: TrainingImages, matcher_of: MatcherOf) -> None:
    recipe = MODELS["memory"]
    content = np.array([[0, 16, 64, 48], [0, 0, 64, 64], [20, 0, 44, 64]] * 3, np.int32)
    features = TeacherFeatures(matcher_of(recipe), TrainingImages(images.pixels, content), BUDGET)
    before = build_memory(features, np.arange(9), recipe)
    for level, mask in zip(features._features, features.content_masks(torch.arange(9)), strict=True):
        assert mask is not None
        level[~mask[:, None].expand_as(level)] = 1000.0
    assert same_banks(before, build_memory(features, np.arange(9), recipe))


def test_of_many_positions_each_image_gives_as_many(
    images: TrainingImages, matcher_of: MatcherOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(MODELS["memory"], memory=100_000)
    monkeypatch.setattr(building, "_CANDIDATES", 180)
    features = TeacherFeatures(matcher_of(recipe), images, BUDGET)
    sizes = [len(bank.vectors) for bank in build_memory(features, np.arange(9), recipe)]
    # The levels have 8 × 8 and 4 × 4 positions: 20 of each image, or all.
    assert sizes == [180, 180, 144, 144]
