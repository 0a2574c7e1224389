from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from stpm.method.false_discovery import benjamini_hochberg, find_discoveries

RATES = st.sampled_from([0.01, 0.05, 0.1, 0.2, 0.5])
# Categories of a run: the number of calibration images n, and of each image how many of them score as high or higher.
CATEGORIES = st.lists(
    st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n), max_size=40))),
    min_size=1,
    max_size=4,
)


def conformal(n: int, at_least: list[int]) -> np.ndarray:
    """Return p-values as scoring stores them."""
    return ((1 + np.array(at_least, int)) / (n + 1)).astype(np.float32)


@given(CATEGORIES, RATES)
def test_the_discoveries_are_those_of_scipy(categories: list[tuple[int, list[int]]], rate: float) -> None:
    p_values = {str(i): conformal(*category) for i, category in enumerate(categories)}
    counts = {name: Counter(values.tolist()) for name, values in p_values.items()}
    found = find_discoveries(counts, {str(i): n for i, (n, _) in enumerate(categories)}, rate)
    together = np.concatenate(list(p_values.values())).astype(float)
    expected = false_discovery_control(together) <= rate * (1 + 1e-6) if len(together) else together > 0
    assert found.images == len(together)
    assert found.count == expected.sum()
    assert set(together[together <= found.cut_off]) == set(together[expected])
    assert found.categories == {name: n for name, p in p_values.items() if (n := int((p <= found.cut_off).sum()))}
    # The stored column compares with the number in run.json as it is.
    assert (np.concatenate(list(p_values.values())) <= found.cut_off).sum() == found.count


@given(CATEGORIES, RATES)
def test_a_category_is_unsupported_if_no_score_of_its_images_is_enough(
    categories: list[tuple[int, list[int]]], rate: float
) -> None:
    counts = {str(i): Counter(conformal(*category).tolist()) for i, category in enumerate(categories)}
    calibration = {str(i): n for i, (n, _) in enumerate(categories)}
    found = find_discoveries(counts, calibration, rate)
    assert found.categories.keys().isdisjoint(found.unsupported)
    # With as many calibration images as it says, the images above all of them are discoveries, and with one less not.
    count = sum(histogram[float(np.float32(1 / (calibration[name] + 1)))] for name, histogram in counts.items())
    if count and found.needed > 1:
        for n, is_enough in ((found.needed, True), (found.needed - 1, False)):
            ideal = {1 / (n + 1): count, 1.0: found.images - count} if count < found.images else {1 / (n + 1): count}
            assert (benjamini_hochberg(ideal, rate) > 0) == is_enough


def test_ties_count_together_and_nothing_is_found_among_nothing() -> None:
    assert benjamini_hochberg({}, 0.1) == 0.0
    assert benjamini_hochberg({0.02: 1, 0.5: 9}, 0.1) == 0.0
    assert benjamini_hochberg({0.02: 2, 0.5: 8}, 0.1) == 0.02


def test_too_small_calibrations_are_named_on_one_line() -> None:
    counts = {"large": {1 / 2: 990}, "small": {float(np.float32(1 / 11)): 10, 0.5: 0}}
    found = find_discoveries(counts, {"large": 1999, "small": 10}, 0.05)
    assert found.count == 0
    # 10 of 1,000 images score above all calibration images: p of at most .05 · 10 / 1,000 = 1/2,000.
    assert (found.needed, found.unsupported) == (1999, {"small": 10})
    assert found.warning() == (
        "too few good images calibrate small (10) for a false discovery rate of 0.05 over 1000 images: none "
        "of their images can be a discovery unless 1999 or more calibrate them"
    )
    assert find_discoveries({"small": {float(np.float32(1 / 11)): 10}}, {"small": 10}, 0.1).warning() == ""
