import dataclasses

import numpy as np
import pytest

from stpm.errors import ConfigError, DataError
from stpm.fitting.groups import group_images, near_duplicates
from stpm.method.recipe import PRESETS, Recipe

LOTS = Recipe(group_from="{group}_{name}")
NAMES = ["s3://bucket/lot-1_0.png", "/data/lot-2_1.png", "lot-1_2.png", "lot-3_3.png"]


@pytest.fixture
def pixels(rng: np.random.Generator) -> np.ndarray:
    """Images that differ by their noise."""
    return rng.integers(60, 190, (6, 40, 56, 3), dtype=np.uint8)


def test_groups_are_named_by_the_path(pixels: np.ndarray) -> None:
    assert group_images(NAMES, pixels[:4], LOTS).tolist() == [0, 1, 0, 2]
    assert group_images(NAMES, pixels[:4], PRESETS["paper"]).tolist() == [0, 1, 2, 3]


def test_near_duplicates_are_of_one_group_and_join_the_groups_of_their_names(
    pixels: np.ndarray, rng: np.random.Generator
) -> None:
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
