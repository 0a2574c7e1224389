"""Kinds of alarms: blobs are found, and neither the order of rows nor their number matters."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from stpm.scoring.kinds import COMPARED, find_kinds, group_alarms


def blobs(sizes: list[int], seed: int = 0, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Draw vectors of length 1 around one direction for each size; return also the number of each one's blob."""
    rng = np.random.default_rng(seed)
    blob = np.repeat(np.arange(len(sizes)), sizes)
    vectors = rng.normal(size=(len(sizes), 64))[blob] + noise * rng.normal(size=(len(blob), 64))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), blob


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), max_size=6), st.integers(0, 1000), st.sampled_from([0.05, 1.0, 30.0]))
def test_any_alarms_in_any_order_have_the_same_kinds_of_like_ones(sizes: list[int], seed: int, noise: float) -> None:
    vectors, _ = blobs(sizes, seed, noise) if sizes else (np.zeros((0, 64), np.float32), None)
    names = [f"{i:03}.png" for i in range(len(vectors))]
    kinds = find_kinds(vectors, names)
    shuffled = np.random.default_rng(seed).permutation(len(vectors))
    assert find_kinds(vectors[shuffled], [names[i] for i in shuffled]).tolist() == kinds[shuffled].tolist()
    counts = np.bincount(kinds[kinds >= 0], minlength=0).tolist()
    assert counts == sorted(counts, reverse=True)
    assert all(count > 1 for count in counts)
    distances = 1 - vectors @ vectors.T
    assert all(distances[i, j] <= 0.8 + 1e-5 for i, j in np.argwhere(kinds[:, None] == kinds) if kinds[i] >= 0)
    # Complete linkage is finished: no two kinds could be one.
    for one in range(len(counts)):
        assert all(distances[kinds == one][:, kinds == other].max() > 0.8 - 1e-5 for other in range(one))


def test_blobs_are_kinds_also_of_more_alarms_than_are_compared_and_one_alone_is_none() -> None:
    vectors, blob = blobs([5, 1, 12, 5])
    kinds = find_kinds(vectors, [f"{i:02}" for i in range(len(vectors))])
    assert kinds.tolist() == [{0: 1, 1: -1, 2: 0, 3: 2}[each] for each in blob]
    # Two kinds, one after the other, and two alarms that are not compared with each other.
    vectors, blob = blobs([COMPARED - 700, COMPARED + 200, 2])
    kinds = find_kinds(vectors, [str(i) for i in range(len(vectors))])
    assert np.unique(kinds[blob < 2]).tolist() == [0, 1]
    assert adjusted_rand_score(blob[blob < 2], kinds[blob < 2]) == 1
    assert kinds[blob == 2].tolist() == [-1] * 2
    assert (kinds == 0).sum() == 2200


@pytest.mark.parametrize("count", [0, 1, 30])
def test_groups_hold_each_row_once_and_never_those_of_two_models(count: int) -> None:
    vectors, _ = blobs([count])
    rows = [
        {
            "uri": str(i),
            "model_id": f"nut-{i % 3 == 0}",
            # Of those that are no alarm, and of a model without a memory, nothing is known.
            "is_anomalous": i % 5 != 0,
            "peak_features": None if i % 5 == 0 or i % 7 == 0 else vectors[i].tolist(),
        }
        for i in range(count)
    ]
    groups = group_alarms(rows)
    assert sorted((row["uri"] for group in groups for row in group), key=int) == [str(i) for i in range(count)]
    kinds = [group for group in groups if len(group) > 1]
    assert [len({row["model_id"] for row in kind}) for kind in kinds] == [1] * len(kinds)
    assert [len(kind) for kind in kinds] == {0: [], 1: [], 30: [13, 7]}[count]
    # The most anomalous comes first in each kind, and among the others.
    for group in (*kinds, [row for (row,) in groups[len(kinds) :]]):
        assert [row["uri"] for row in group] == sorted((row["uri"] for row in group), key=int)
