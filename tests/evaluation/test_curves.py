from __future__ import annotations

import numpy as np
import pytest

from stpm.evaluation.curves import histogram, image_roc, pixel_pro, pixel_roc, thinned
from stpm.evaluation.pixels import PixelCounts


def test_a_thinned_curve_keeps_its_ends_and_its_area() -> None:
    x = np.sort(np.random.default_rng(0).random(50_000))
    x[0], x[-1] = 0.0, 1.0
    few_x, few_y = thinned(x, x**0.05)
    assert len(few_x) <= 202
    assert (few_x[0], few_y[0], few_x[-1], few_y[-1]) == (0.0, 0.0, 1.0, 1.0)
    assert np.trapezoid(few_y, few_x) == pytest.approx(np.trapezoid(x**0.05, x), abs=2e-3)


def test_curves_have_the_area_of_their_figure() -> None:
    rng = np.random.default_rng(1)
    masks = np.zeros((3, 40, 40), bool)
    masks[:, 5:15, 5:15] = True
    counts = PixelCounts.of((rng.random(masks.shape) + masks * 0.5).astype(np.float32), masks)
    x, y = pixel_roc(counts)
    assert np.trapezoid(y, x) == pytest.approx(counts.auroc().value, abs=2e-3)
    x, y = pixel_pro(counts, 0.3)
    assert x[-1] == pytest.approx(0.3)
    assert np.trapezoid(y, x) / 0.3 == pytest.approx(counts.aupro(0.3).value, abs=2e-3)
    assert image_roc(np.array([False, True]), np.array([0, 1], np.float32)) == ((0, 0, 1), (0, 1, 1))


@pytest.mark.parametrize("scores", [[1e-6, 1e-3, 1.0], [0.5, 0.6, 0.7], [-1.0, 0.0, 5.0], [2.0, 2.0, 2.0]])
def test_every_image_is_in_the_histogram(scores: list[float]) -> None:
    found = histogram(np.array(scores, np.float32), ["good", "good", "crack"], threshold=2.0)
    assert found
    assert found.logarithmic == (scores[0] == 1e-6)
    assert {label: sum(counts) for label, counts in found.counts.items()} == {"good": 2, "crack": 1}
    assert found.edges[0] <= min(scores)
    assert found.edges[-1] >= 2.0


def test_no_image_has_no_histogram() -> None:
    assert histogram(np.zeros(0, np.float32), [], 1.0) is None
