from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import roc_auc_score

from stpm.evaluation.metrics import UndefinedMetricError, auroc


def by_definition(is_defect: np.ndarray, scores: np.ndarray) -> float:
    """The chance that a defect scores above a good one, a tie counting half."""
    defects, good = scores[is_defect].astype(float), scores[~is_defect].astype(float)
    above = (defects[:, None] > good).sum() + 0.5 * (defects[:, None] == good).sum()
    return float(above / (len(defects) * len(good)))


@given(
    st.integers(2, 40).flatmap(
        lambda n: st.tuples(
            hnp.arrays(bool, n),
            hnp.arrays(np.float32, n, elements=st.sampled_from([0, 1e-30, 1e-9, 1, 1 + 2**-23, 3])),
        )
    )
)
def test_auroc_is_the_definition_and_sklearns_with_many_ties(case: tuple[np.ndarray, np.ndarray]) -> None:
    is_defect, scores = case
    assume(is_defect.any() and not is_defect.all())
    assert auroc(is_defect, scores) == pytest.approx(by_definition(is_defect, scores))
    assert auroc(is_defect, scores) == pytest.approx(roc_auc_score(is_defect, scores))


def test_scores_far_above_one_do_not_tie() -> None:
    scores = np.array([50.0, 60.0, 70.0, 80.0], np.float32)
    assert auroc(np.array([False, False, True, True]), scores) == 1.0


@pytest.mark.parametrize(
    ("is_defect", "scores", "reason"),
    [
        ([False, False], [0.1, 0.2], "no defective ones among 2"),
        ([True, True], [0.1, 0.2], "no good ones among 2"),
        ([], [], "no defective ones among 0"),
        ([True, False], [float("nan"), 0.2], "not finite"),
    ],
)
def test_what_is_undefined_has_a_reason(is_defect: list[bool], scores: list[float], reason: str) -> None:
    with pytest.raises(UndefinedMetricError, match=reason):
        auroc(np.array(is_defect, bool), np.array(scores, np.float32))
