"""Groups of images, and splits into whole groups."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stpm.errors import ConfigError, DataError
from stpm.fitting.groups import group_images, near_duplicates
from stpm.fitting.splits import split_batches, split_folds, split_images
from stpm.method.recipe import PRESETS, Recipe

PAPER = PRESETS["paper"]
FOLDED = PRESETS["default"]


# The number of each image's group.
GROUPS = st.lists(st.integers(0, 30), min_size=3, max_size=120).map(np.array).filter(lambda each: len({*each}) > 1)
IMAGES = st.integers(3, 500).map(np.arange)


def in_whole_groups(groups: np.ndarray, chosen: np.ndarray) -> bool:
    return not {*groups[chosen]} & {*np.delete(groups, chosen)}


@pytest.mark.parametrize("seed", range(6))
def test_a_large_group_is_held_out_where_a_single_image_is_too_few(seed: int) -> None:
    train, held_out = split_images(np.repeat([0, 1, 2], [6, 6, 1]), dataclasses.replace(FOLDED, seed=seed))
    assert len(train) in (6, 7)
    assert len(held_out) in (6, 7)


@given(IMAGES | GROUPS, st.floats(0.01, 0.99), st.integers(0, 1000))
def test_split_is_a_partition_of_whole_groups_into_two_sides(groups: np.ndarray, fraction: float, seed: int) -> None:
    recipe = dataclasses.replace(PAPER, held_out_fraction=fraction, seed=seed)
    count = len(groups)
    try:
        train, held_out = split_images(groups, recipe)
    except DataError as error:
        assert "leave only 1 image to hold out" in str(error)
        assert len({*groups}) < count
        return
    assert sorted([*train, *held_out]) == list(range(count))
    assert len(train) >= 1
    assert in_whole_groups(groups, held_out)
    if len({*groups}) == count:
        assert abs(len(held_out) - count * fraction) <= 1
    assert all((np.diff(part) > 0).all() for part in (train, held_out))


def test_paper_split_is_80_to_20_and_depends_on_the_seed() -> None:
    images = np.arange(209)
    assert tuple(map(len, split_images(images, PAPER))) == (167, 42)
    assert (split_images(images, PAPER)[1] != split_images(images, dataclasses.replace(PAPER, seed=1))[1]).any()
    # Batches keep the order.
    assert [batch.tolist() for batch in split_batches(np.array([5, 1, 4, 2, 3]), 2)] == [[5, 1], [4, 2], [3]]


@given(IMAGES | GROUPS, st.integers(2, 20), st.integers(0, 1000))
def test_folds_are_a_partition_into_whole_groups(groups: np.ndarray, wanted: int, seed: int) -> None:
    folds, count = split_folds(groups, dataclasses.replace(FOLDED, calibration_folds=wanted, seed=seed)), len(groups)
    assert 2 <= len(folds) <= min(wanted, count)
    assert sorted(np.concatenate(folds)) == list(range(count))
    assert all(in_whole_groups(groups, fold) and (np.diff(fold) > 0).all() for fold in folds)
    if len({*groups}) == count:
        lengths = [len(fold) for fold in folds]
        assert len(folds) == min(wanted, count)
        assert max(lengths) <= min(lengths) + 1


LOTS = Recipe(group_from="{group}_{name}")
NAMES = ["s3://bucket/lot-1_0.png", "/data/lot-2_1.png", "lot-1_2.png", "lot-3_3.png"]


@pytest.fixture
def pixels(rng: np.random.Generator) -> np.ndarray:
    """Images that differ by their noise."""
    return rng.integers(60, 190, (6, 40, 56, 3), dtype=np.uint8)


def test_groups_are_named_by_the_path_and_by_near_duplicates(pixels: np.ndarray, rng: np.random.Generator) -> None:
    assert group_images(NAMES, pixels[:4], LOTS).tolist() == [0, 1, 0, 2]
    assert group_images(NAMES, pixels[:4], PRESETS["paper"]).tolist() == [0, 1, 2, 3]
    pixels[3] = np.clip(pixels[1].astype(int) + rng.integers(-2, 3, pixels[1].shape), 0, 255)
    pairs = near_duplicates(pixels)
    assert {(i, j) for i, j in pairs.tolist() if i < j} == {(1, 3)}
    assert group_images([""] * 6, pixels, PRESETS["paper"]).tolist() == [0, 1, 2, 1, 3, 4]
    assert group_images(NAMES, pixels[:4], LOTS).tolist() == [0, 1, 0, 1]


def test_images_of_two_colours_and_faint_ones_are_told_apart_and_their_copies_found(rng: np.random.Generator) -> None:
    noise = np.kron(rng.normal(0, 5, (20, 32, 32, 3)), np.ones((1, 2, 2, 1)))
    colours = np.concatenate([40 + noise[:10], 210 + noise[10:]]).astype(np.uint8)
    assert len(set(group_images([""] * 20, colours, PRESETS["paper"]))) == 20
    faint = (240 + rng.integers(0, 3, (100, 64, 64, 3))).astype(np.uint8)
    faint[50:] = faint[:50]
    assert group_images([""] * 100, faint, PRESETS["paper"]).tolist() == [*range(50), *range(50)]


def test_images_that_are_all_equal_are_no_group() -> None:
    """There would be nothing to hold out."""
    assert group_images(["a", "b", "c"], np.full((3, 40, 40, 3), 7, np.uint8), PRESETS["paper"]).tolist() == [0, 1, 2]
    assert group_images(["a"], np.full((1, 40, 40, 3), 7, np.uint8), PRESETS["paper"]).tolist() == [0]


def test_a_name_without_a_group_and_a_single_group_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"--group-from '{group}_{name}' finds no group in lot.png; an image without"):
        group_images(["lot.png", "a_1.png", ""], pixels[:3], LOTS)
    with pytest.raises(DataError, match="puts all images into one group"):
        group_images(["a_0.png", "a_1.png"], pixels[:2], LOTS)
    with pytest.raises(ConfigError, match=r"--group-from is '{lot}_{name}'; use {group} exactly once"):
        dataclasses.replace(LOTS, group_from="{lot}_{name}")
