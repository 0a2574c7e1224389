import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stpm.errors import DataError
from stpm.fitting.splits import split_batches, split_folds, split_images
from stpm.method.recipe import PRESETS

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
def test_split_is_a_partition_of_whole_groups_without_empty_sides(
    groups: np.ndarray, fraction: float, seed: int
) -> None:
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


def test_batches_keep_the_order() -> None:
    batches = split_batches(np.array([5, 1, 4, 2, 3]), 2)
    assert [batch.tolist() for batch in batches] == [[5, 1], [4, 2], [3]]
