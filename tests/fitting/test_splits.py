from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stpm.fitting.splits import split_batches, split_folds, split_images
from stpm.method.recipe import PRESETS

PAPER = PRESETS["paper"]


@given(st.integers(2, 500), st.floats(0.01, 0.99), st.integers(0, 1000))
def test_split_is_a_partition_without_empty_sides(count: int, fraction: float, seed: int) -> None:
    train, held_out = split_images(count, dataclasses.replace(PAPER, held_out_fraction=fraction, seed=seed))
    assert sorted([*train, *held_out]) == list(range(count))
    assert len(train) >= 1
    assert abs(len(held_out) - count * fraction) <= 1


def test_paper_split_is_80_to_20_and_depends_on_the_seed() -> None:
    assert tuple(map(len, split_images(209, PAPER))) == (167, 42)
    assert (split_images(209, PAPER)[1] != split_images(209, dataclasses.replace(PAPER, seed=1))[1]).any()


@given(st.integers(4, 200), st.integers(2, 20), st.integers(0, 1000))
def test_folds_are_a_partition_of_about_equal_parts(count: int, wanted: int, seed: int) -> None:
    folds = split_folds(count, dataclasses.replace(PAPER, calibration_folds=wanted, seed=seed))
    assert len(folds) == min(wanted, count // 2)
    assert sorted(np.concatenate([fold for _, fold in folds])) == list(range(count))
    # A model has 80 % of the images, and no fold's model has more.
    fit_count = count - round(count * 0.2)
    assert all(len(rest) == min(count - len(fold), fit_count) for rest, fold in folds)
    assert all(not {*rest} & {*fold} for rest, fold in folds)
    lengths = [len(fold) for _, fold in folds]
    assert 2 <= min(lengths) <= max(lengths) <= min(lengths) + 1
    assert all((np.diff(part) > 0).all() for pair in folds for part in pair)


def test_batches_keep_the_order() -> None:
    batches = split_batches(np.array([5, 1, 4, 2, 3]), 2)
    assert [batch.tolist() for batch in batches] == [[5, 1], [4, 2], [3]]
