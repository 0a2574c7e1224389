"""Pixel metrics against plain implementations of their definitions, scikit-learn, and a peer's values."""

import json
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from bench.peer_aupro import case as peer_case
from stpm.errors import UndefinedMetricError
from stpm.metrics.pixel_metrics import PixelCounts, count_pixels
from tests.method.test_regions import flood

LIMITS = (0.05, 0.3, 1.0)
SCIKIT_LEARN = {"auroc": roc_auc_score, "average_precision": average_precision_score}


def aupro_by_definition(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """Compute AUPRO one threshold and one region at a time."""
    regions = [(i, region) for i, mask in enumerate(masks) for region in flood(mask)]
    outside = maps[~masks]
    curve = [(0.0, 0.0)]
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        overlap = [np.mean([maps[i][place] >= threshold for place in region]) for i, region in regions]
        curve.append((float(np.mean(outside >= threshold)), float(np.mean(overlap))))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x1 <= limit:
            area += (x1 - x0) * (y0 + y1) / 2
        elif x0 < limit:
            at_limit = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            area += (limit - x0) * (y0 + at_limit) / 2
    return area / limit


def random_case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Make difficult maps and masks: ties, constant maps, negative scores, whole and empty masks."""
    n, size = int(rng.integers(1, 4)), int(rng.integers(3, 13))
    masks = rng.random((n, size, size)) < rng.choice([0.02, 0.1, 0.4, 0.9])
    masks[0, 0, 0], masks[-1, -1, -1] = True, False
    maps = rng.normal(size=masks.shape) * 10.0 ** rng.integers(-20, 3) + masks * rng.choice([0.0, 1.0, 3.0])
    kind = rng.integers(5)
    if kind == 1:
        maps = np.round(maps, 1)
    elif kind == 2:
        maps = np.abs(maps) ** 3
    elif kind == 3:
        maps = np.full_like(maps, maps.flat[0])
    elif kind == 4:
        # The two zeros tie.
        maps = rng.choice([-2.0, -1.0, -0.0, 0.0, 1.0], maps.shape)
    return maps.astype(np.float32), masks


PEER = json.loads((Path(__file__).parent / "peer_aupro.json").read_text())


@pytest.mark.parametrize("seed", range(len(PEER["aupro"])))
def test_aupro_agrees_with_another_implementation(seed: int) -> None:
    counts = count_pixels(*peer_case(seed))
    assert [counts.aupro(limit) for limit in PEER["limits"]] == pytest.approx(PEER["aupro"][seed], abs=2e-6)


@pytest.mark.parametrize("seed", range(200))
def test_metrics_agree_with_their_definitions(seed: int) -> None:
    maps, masks = random_case(np.random.default_rng(seed))
    counts = count_pixels(maps, masks)
    precision, recall, _ = precision_recall_curve(masks.ravel(), maps.ravel())
    f1 = [2 * p * r / (p + r) if p + r else 0.0 for p, r in zip(precision, recall, strict=True)]
    expected = {name: of(masks.ravel(), maps.ravel()) for name, of in SCIKIT_LEARN.items()}
    assert counts.rank_metrics() == pytest.approx(expected | {"f1_max": max(f1)})
    for limit in LIMITS:
        assert counts.aupro(limit) == pytest.approx(aupro_by_definition(maps, masks, limit))


def test_with_fewer_keys_values_differ_by_less_than_1e_4_on_maps_like_real_ones() -> None:
    rng = np.random.default_rng(0)
    masks = np.zeros((40, 128, 128), bool)
    masks[::2, 40:60, 50:90] = True
    maps = (rng.lognormal(-9, 1.5, masks.shape) * np.where(masks, 4, 1)).astype(np.float32)
    counts = sum((count_pixels(m[None], k[None]) for m, k in zip(maps, masks, strict=True)), start=PixelCounts.empty())
    exact = count_pixels(maps, masks, max_keys=2**20)
    assert (counts.lost_bits > 0, exact.lost_bits) == (True, 0)
    for name, value in counts.rank_metrics().items():
        assert 0 < abs(value - exact.rank_metrics()[name]) < 1e-4
    for limit in LIMITS:
        assert 0 < abs(counts.aupro(limit) - exact.aupro(limit)) < 1e-4


@given(st.integers(0, 10_000), st.integers(4, 200), st.data())
def test_the_order_and_grouping_of_merges_do_not_matter(seed: int, max_keys: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    maps, masks = rng.lognormal(0, 3, (6, 5, 5)).astype(np.float32), rng.random((6, 5, 5)) < 0.3
    whole = count_pixels(maps, masks, max_keys)
    parts = [count_pixels(maps[i : i + 1], masks[i : i + 1], max_keys) for i in data.draw(st.permutations(range(6)))]
    while len(parts) > 1:
        i = data.draw(st.integers(0, len(parts) - 2))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    (merged,) = parts
    assert merged.lost_bits == whole.lost_bits
    assert merged.regions == whole.regions
    np.testing.assert_array_equal(merged.keys, whole.keys)
    np.testing.assert_array_equal(merged.sums[:2], whole.sums[:2])
    np.testing.assert_allclose(merged.sums[2], whole.sums[2])


def test_the_state_does_not_grow_with_the_number_of_images() -> None:
    rng = np.random.default_rng(0)
    counts = PixelCounts.empty()
    for _ in range(20):
        maps = rng.lognormal(0, 1, (4, 64, 64)).astype(np.float32)
        counts += count_pixels(maps, rng.random(maps.shape) < 0.01)
        assert len(pickle.dumps(counts)) < 2**17 * 28 + 10_000
    assert counts.lost_bits > 0
    assert counts.sums[:2].sum() == 20 * 4 * 64 * 64


@pytest.mark.parametrize(
    ("maps", "masks", "reason"),
    [
        ([[1.0, 2.0]], [[False, False]], "no defective pixels"),
        ([[1.0, 2.0]], [[True, True]], "no good pixels"),
        ([[1.0, float("nan")]], [[True, False]], "no good pixels"),
        ([[1.0, float("inf")]], [[True, False]], "infinite"),
    ],
)
def test_an_undefined_metric_has_a_reason(maps: list[list[float]], masks: list[list[bool]], reason: str) -> None:
    with pytest.raises(UndefinedMetricError, match=reason):
        count_pixels(np.array([maps], np.float32), np.array([masks])).aupro(0.3)
    with pytest.raises(ValueError, match="differ in shape"):
        count_pixels(np.zeros((1, 2, 2), np.float32), np.array([masks]))
