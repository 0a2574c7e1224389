import dataclasses

import numpy as np
import pytest
import torch

from stpm.detector import Detector
from stpm.fitting.training_images import TrainingImages
from stpm.method.memory_bank import MemoryBank
from stpm.options import Integers
from tests.conftest import MODELS, record_calls
from tests.fitting.helpers import PADDED, RAM, FeaturesOf, build_memory, replace_padding, same_tensors, unpadded

# Its banks hold every descriptor.
WHOLE = dataclasses.replace(MODELS["memory"], memory=100_000)


def same_banks(first: tuple[MemoryBank, ...], second: tuple[MemoryBank, ...]) -> bool:
    return len(first) == len(second) and all(
        a.spec == b.spec and same_tensors(a.tensors, b.tensors) for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("ram", [RAM, 0])
def test_same_images_give_the_same_memory(features_of: FeaturesOf, ram: int) -> None:
    recipe, train = MODELS["memory"], np.array([0, 1, 2, 4, 5, 7, 8])
    first, again, other = (
        build_memory(features_of(recipe, ram=ram), train, dataclasses.replace(recipe, seed=seed)) for seed in (0, 0, 1)
    )
    assert [(bank.spec.level_index, bank.spec.kind, bank.spec.window) for bank in first] == [
        (1, "features", 3),
        (1, "directions", 3),
        (2, "features", 1),
        (2, "directions", 1),
    ]
    # The coarsest level has 16 positions on each of 7 images.
    assert [len(bank.vectors) for bank in first] == [50] * 4
    assert same_banks(first, again)
    assert not same_banks(first, other)
    assert build_memory(features_of(recipe, ram=ram), train, MODELS["student"]) == ()


def test_recomputed_features_give_about_the_same_memory(features_of: FeaturesOf) -> None:
    """Cached features are rounded to half precision. The banks hold all of them, since rounding may change a choice."""
    cached, recomputed = (build_memory(features_of(WHOLE, ram=ram), np.arange(6), WHOLE) for ram in (RAM, 0))
    levels = features_of(WHOLE, ram=0)(np.arange(6, 9))
    for one, other in zip(cached, recomputed, strict=True):
        torch.testing.assert_close(one.mean, other.mean, rtol=2e-3, atol=1e-4)
        distances = [bank.distance_map(levels[bank.spec.level_index]) for bank in (one, other)]
        torch.testing.assert_close(*distances, rtol=2e-2, atol=1e-2)


def test_memory_holds_only_training_images(images: TrainingImages, features_of: FeaturesOf) -> None:
    pixels = images.pixels.copy()
    pixels[[2, 5]] = (255, 0, 0)
    features, train = features_of(WHOLE, unpadded(pixels)), np.array([0, 1, 3, 4, 6, 7, 8])
    odd = features(np.array([2, 5]))
    without, with_it = (build_memory(features, each, WHOLE) for each in (train, np.append(train, 2)))
    for bank, larger in zip(without, with_it, strict=True):
        index = bank.spec.level_index
        assert larger.distance_map(odd[index]).max() < 0.05
        known = bank.distance_map(features(train)[index])
        assert known.max() < 0.05
        assert bank.distance_map(odd[index]).min() > 20 * known.max()


def test_what_lies_elsewhere_is_farther_in_the_coarse_view_alone(features_of: FeaturesOf) -> None:
    recipe, everything = dataclasses.replace(MODELS["two views"], memory=100_000), np.arange(9)
    features = features_of(recipe)
    coarsest = [bank for bank in build_memory(features, everything, recipe) if bank.spec.window == 1]
    first_coarse = len(features.teacher.views[0].levels)
    assert {bank.spec.level_index >= first_coarse for bank in coarsest} == {False, True}
    for bank in coarsest:
        level = features(everything)[bank.spec.level_index]
        assert bank.distance_map(level).max() < 0.05
        moved = bank.distance_map(level.roll(1, dims=3))
        assert moved.min() > 0.5 if bank.spec.level_index >= first_coarse else moved.max() < 0.05


def test_memory_holds_no_padding(images: TrainingImages, features_of: FeaturesOf) -> None:
    recipe = MODELS["memory"]
    features = features_of(recipe, dataclasses.replace(images, content=PADDED))
    before = build_memory(features, np.arange(9), recipe)
    replace_padding(features, 1000.0)
    assert same_banks(before, build_memory(features, np.arange(9), recipe))


def test_a_memory_of_other_brightness_knows_an_aged_lamp(images: TrainingImages, features_of: FeaturesOf) -> None:
    recipe = dataclasses.replace(WHOLE, brightness=0.2)
    features, train = features_of(WHOLE), np.arange(9)
    darker = features.brightened(train, np.full(9, 0.88, np.float32))
    for plain, aged in zip(build_memory(features, train, WHOLE), build_memory(features, train, recipe), strict=True):
        assert len(aged.vectors) == 2 * len(plain.vectors)
        distances = [bank.distance_map(darker[bank.spec.level_index]).mean() for bank in (plain, aged)]
        assert distances[1] < distances[0]
    assert same_banks(build_memory(features, train, recipe), build_memory(features, train, recipe))


def test_padding_is_not_dimmed(
    images: TrainingImages, features_of: FeaturesOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = features_of(WHOLE, dataclasses.replace(images, content=PADDED))
    calls = record_calls(monkeypatch, features.teacher, "inputs")
    features.brightened(np.arange(2), np.array([0.5, 0.5], np.float32))
    ((pixels,),) = calls
    for before, after, (left, top, right, bottom) in zip(
        images.pixels, pixels.numpy(), PADDED.boxes.tolist(), strict=False
    ):
        inside = np.zeros(before.shape[:2], bool)
        inside[top:bottom, left:right] = True
        np.testing.assert_array_equal(after[~inside], before[~inside])
        np.testing.assert_allclose(after[inside], before[inside] * 0.5, atol=0.5)


def test_candidates_are_spread_evenly_over_images(features_of: FeaturesOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stpm.fitting.build_memory._MAX_CANDIDATES", 180)
    sizes = [len(bank.vectors) for bank in build_memory(features_of(WHOLE), np.arange(9), WHOLE)]
    # The levels have 8 × 8 and 4 × 4 positions: 20 of each image, or all.
    assert sizes == [180, 180, 144, 144]


def test_the_finest_level_has_a_descriptor_every_eight_pixels(images: TrainingImages, features_of: FeaturesOf) -> None:
    recipe, all_images = dataclasses.replace(WHOLE, memory_levels=Integers((1, 2))), np.arange(9)
    features = features_of(recipe)
    assert features.shapes[:2] == [(16, 16), (8, 8)]
    banks = build_memory(features, all_images, recipe)
    specs = [(bank.spec.level_index, bank.spec.window, bank.spec.stride) for bank in banks]
    assert specs == [(0, 4, 2)] * 2 + [(1, 1, 1)] * 2
    detector = Detector.assemble(features.teacher, recipe, None, banks)
    maps = detector.distances(features.inputs(all_images), images.content, features(all_images)).memory
    assert [tuple(distances.shape) for distances in maps] == [(9, 8, 8)] * 4
    assert max(float(distances.max()) for distances in maps) < 0.05
