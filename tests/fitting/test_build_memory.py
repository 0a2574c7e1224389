from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from stpm.detector import Detector
from stpm.fitting.build_memory import build_memory, choose_levels
from stpm.fitting.splits import split_images
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.training_images import TrainingImages
from stpm.method.memory_bank import MemoryBank
from stpm.options import Integers
from tests.conftest import MODELS
from tests.fitting.helpers import BUDGET, TeacherOf, unpadded


def same_banks(first: tuple[MemoryBank, ...], second: tuple[MemoryBank, ...]) -> bool:
    return len(first) == len(second) and all(
        a.spec == b.spec
        and all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("mean", "whitening", "vectors"))
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("budget", [BUDGET, 0])
def test_same_images_give_the_same_memory(images: TrainingImages, make_teacher: TeacherOf, budget: int) -> None:
    recipe = MODELS["memory"]
    train, _ = split_images(len(images), recipe)
    first, again, other = (
        build_memory(
            TeacherFeatures(make_teacher(recipe), images, budget), train, dataclasses.replace(recipe, seed=seed)
        )
        for seed in (0, 0, 1)
    )
    assert [(bank.spec.level_index, bank.spec.kind) for bank in first] == [
        (1, "features"),
        (1, "directions"),
        (2, "features"),
        (2, "directions"),
    ]
    assert [bank.spec.window for bank in first] == [3, 3, 1, 1]
    # The coarsest level has 16 positions on each of 7 images.
    assert [len(bank.vectors) for bank in first] == [50] * 4
    assert same_banks(first, again)
    assert not same_banks(first, other)
    assert build_memory(TeacherFeatures(make_teacher(recipe), images, budget), train, MODELS["student"]) == ()


def test_recomputed_features_give_about_the_same_memory(images: TrainingImages, make_teacher: TeacherOf) -> None:
    """Cached features are rounded to half precision. The banks hold all of them, since rounding may change a choice."""
    recipe = dataclasses.replace(MODELS["memory"], memory=100_000)
    features = [TeacherFeatures(make_teacher(recipe), images, budget) for budget in (BUDGET, 0)]
    cached, recomputed = (build_memory(each, np.arange(6), recipe) for each in features)
    levels, masks = features[1](np.arange(6, 9)), [None] * 3
    for one, other in zip(cached, recomputed, strict=True):
        torch.testing.assert_close(one.mean, other.mean, rtol=2e-3, atol=1e-4)
        distances = [
            bank.distance_map(levels[bank.spec.level_index], masks[bank.spec.level_index]) for bank in (one, other)
        ]
        torch.testing.assert_close(*distances, rtol=2e-2, atol=1e-2)


def test_memory_holds_only_training_images(images: TrainingImages, make_teacher: TeacherOf) -> None:
    recipe = dataclasses.replace(MODELS["memory"], memory=100_000)
    pixels = images.pixels.copy()
    pixels[[2, 5]] = (255, 0, 0)
    features = TeacherFeatures(make_teacher(recipe), unpadded(pixels), BUDGET)
    train = np.array([0, 1, 3, 4, 6, 7, 8])
    odd = features(np.array([2, 5]))
    for bank, with_it in zip(
        build_memory(features, train, recipe), build_memory(features, np.append(train, 2), recipe), strict=True
    ):
        assert with_it.distance_map(odd[bank.spec.level_index]).max() < 0.05
        known = bank.distance_map(features(train)[bank.spec.level_index])
        assert known.max() < 0.05
        assert bank.distance_map(odd[bank.spec.level_index]).min() > 20 * known.max()


def test_memory_holds_no_padding(images: TrainingImages, make_teacher: TeacherOf) -> None:
    recipe = MODELS["memory"]
    content = np.array([[0, 16, 64, 48], [0, 0, 64, 64], [20, 0, 44, 64]] * 3, np.int32)
    features = TeacherFeatures(make_teacher(recipe), dataclasses.replace(images, content=content), BUDGET)
    before = build_memory(features, np.arange(9), recipe)
    for level, mask in zip(features._features, features.content_masks(np.arange(9)), strict=True):
        assert mask is not None
        level[~mask[:, None].expand_as(level)] = 1000.0
    assert same_banks(before, build_memory(features, np.arange(9), recipe))


def test_memory_candidates_are_spread_evenly_over_images(
    images: TrainingImages, make_teacher: TeacherOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(MODELS["memory"], memory=100_000)
    monkeypatch.setattr("stpm.fitting.build_memory._MAX_CANDIDATES", 180)
    features = TeacherFeatures(make_teacher(recipe), images, BUDGET)
    sizes = [len(bank.vectors) for bank in build_memory(features, np.arange(9), recipe)]
    # The levels have 8 × 8 and 4 × 4 positions: 20 of each image, or all.
    assert sizes == [180, 180, 144, 144]


@pytest.mark.parametrize(
    ("levels", "channels", "indices"),
    [
        ((), [64, 128, 256], [0, 1, 2]),
        ((), [24, 40, 112], [1, 2]),
        ((), [8, 16, 24], [2]),
        ((1, 3), [24, 40, 112], [0, 2]),
    ],
)
def test_levels_with_many_channels_have_banks_unless_the_recipe_names_levels(
    levels: tuple[int, ...], channels: list[int], indices: list[int]
) -> None:
    recipe = dataclasses.replace(MODELS["memory"], memory_levels=Integers(levels))
    assert choose_levels(recipe, channels) == indices


def test_the_finest_level_has_a_descriptor_every_eight_pixels(images: TrainingImages, make_teacher: TeacherOf) -> None:
    recipe = dataclasses.replace(MODELS["memory"], memory_levels=Integers((1, 2)), memory=100_000)
    features = TeacherFeatures(make_teacher(recipe), images, BUDGET)
    assert features.shapes[:2] == [(16, 16), (8, 8)]
    banks = build_memory(features, np.arange(9), recipe)
    assert [(bank.spec.level_index, bank.spec.window, bank.spec.stride) for bank in banks] == [(0, 4, 2)] * 2 + [
        (1, 1, 1)
    ] * 2
    detector = Detector.assemble(features.teacher, recipe, None, banks)
    maps = detector.distances(features.inputs(np.arange(9)), images.content[:9], features(np.arange(9))).memory
    assert [tuple(distances.shape) for distances in maps] == [(9, 8, 8)] * 4
    # The banks hold every descriptor.
    assert max(float(distances.max()) for distances in maps) < 0.05
