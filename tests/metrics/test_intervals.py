import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from stpm.errors import UndefinedMetricError
from stpm.metrics.intervals import paired_aurocs, rank_metrics, wilson_interval


def by_resampling(is_defect: np.ndarray, scores: np.ndarray, draws: int) -> dict[str, np.ndarray]:
    """Compute the ends of the interval by drawing images one by one, and each metric by scikit-learn."""
    rng = np.random.default_rng(7)
    good, defects = np.flatnonzero(~is_defect), np.flatnonzero(is_defect)
    found: dict[str, list[float]] = {"auroc": [], "average_precision": [], "f1_max": []}
    for _ in range(draws):
        chosen = np.concatenate([rng.choice(good, len(good)), rng.choice(defects, len(defects))])
        labels, values = is_defect[chosen], scores[chosen]
        precision, recall, _ = precision_recall_curve(labels, values)
        found["auroc"].append(roc_auc_score(labels, values))
        found["average_precision"].append(average_precision_score(labels, values))
        found["f1_max"].append(float(np.nanmax(2 * precision * recall / np.maximum(precision + recall, 1e-30))))
    return {name: np.quantile(values, [0.025, 0.975]) for name, values in found.items()}


@pytest.mark.parametrize("ties", [False, True])
def test_intervals_agree_with_drawing_images_one_by_one(ties: bool) -> None:
    rng = np.random.default_rng(3)
    is_defect = np.arange(60) < 25
    scores = (rng.normal(size=60) + 1.2 * is_defect).astype(np.float32)
    scores = np.round(scores) if ties else scores
    ours = rank_metrics(is_defect, scores)
    for name, ends in by_resampling(is_defect, scores, 400).items():
        _, (low, high) = ours[name]
        assert (low, high) == pytest.approx(tuple(ends), abs=0.02), name
        assert low < high
    assert ours == rank_metrics(is_defect, scores)


def test_the_interval_holds_the_true_auroc_at_its_confidence() -> None:
    # Normal scores, one std apart: AUROC is Φ(1/√2) = .7602.
    rng = np.random.default_rng(11)
    is_defect = np.arange(60) < 30
    held = 0
    for _ in range(100):
        _, (low, high) = rank_metrics(is_defect, (rng.normal(size=60) + is_defect).astype(np.float32))["auroc"]
        held += low <= 0.7602 <= high
    # At 95 %, fewer than 87 of 100 have a chance of one in a thousand.
    assert held >= 87
    # That of separated classes has no width.
    assert rank_metrics(np.array([False, True, True]), np.array([0, 1, 2], np.float32))["auroc"] == (1.0, (1.0, 1.0))


@pytest.mark.parametrize("shared", [0.0, 0.95])
def test_a_paired_interval_takes_the_same_images_of_both(shared: float) -> None:
    """Against one by one, with ties; what both scores share makes the interval of their difference narrower."""
    rng = np.random.default_rng(5)
    is_defect = np.arange(80) < 35
    common, own = rng.normal(size=80), rng.normal(size=(2, 80))
    scores = (np.sqrt(shared) * common + np.sqrt(1 - shared) * own + is_defect).round(1).astype(np.float32)
    good, defects = np.flatnonzero(~is_defect), np.flatnonzero(is_defect)
    drawn = [np.concatenate([rng.choice(good, len(good)), rng.choice(defects, len(defects))]) for _ in range(600)]
    a, b = ([roc_auc_score(is_defect[each], one[each]) for each in drawn] for one in scores)
    found = paired_aurocs(is_defect, scores)
    aurocs = [roc_auc_score(is_defect, each) for each in scores]
    assert [value for value, _ in found] == pytest.approx([*aurocs, aurocs[1] - aurocs[0]])
    for (_, ends), values in zip(found, (a, b, np.subtract(b, a)), strict=True):
        assert ends == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=0.02)
    width_a, width_b, width = (high - low for _, (low, high) in found)
    assert (width < 0.5 * min(width_a, width_b)) == (shared > 0)
    assert found[0][1] == pytest.approx(rank_metrics(is_defect, scores[0])["auroc"][1], abs=0.01)


def test_a_fraction_has_wilsons_interval() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 15 of 148, and 0 of 20.
    assert wilson_interval(np.arange(148) < 15) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson_interval(np.zeros(20, bool)) == pytest.approx((0.0, 0.1611), abs=1e-4)


@pytest.mark.parametrize(
    ("is_defect", "scores", "reason"),
    [
        ([False, False], [0.1, 0.2], "no defective ones among 2"),
        ([True, True], [0.1, 0.2], "no good ones among 2"),
        ([], [], "no defective ones among 0"),
        ([True, False], [float("nan"), 0.2], "not finite"),
    ],
)
def test_an_undefined_metric_has_a_reason(is_defect: list[bool], scores: list[float], reason: str) -> None:
    with pytest.raises(UndefinedMetricError, match=reason):
        rank_metrics(np.array(is_defect, bool), np.array(scores, np.float32))
