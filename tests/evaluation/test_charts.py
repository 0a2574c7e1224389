from pathlib import Path

import numpy as np
import pytest

from stpm.evaluation.category import read_scores
from stpm.evaluation.charts import draw_charts, histogram_bins, roc_curves
from stpm.metrics.category_metrics import measure_category
from tests.evaluation.runs import scored_run


def test_curves_have_the_area_of_their_metric(tmp_path: Path) -> None:
    scores = read_scores(scored_run(tmp_path))
    values = measure_category(scores).values
    areas = {name: np.trapezoid(y, x) for name, (x, y) in roc_curves(scores).items()}
    assert areas["image ROC"] == pytest.approx(values["image_auroc"])
    assert areas["pixel ROC"] == pytest.approx(values["pixel_auroc"])
    assert areas["PRO to 0.3"] / 0.3 == pytest.approx(values["pixel_aupro"])
    # A chart that would be empty is not drawn.
    assert draw_charts(read_scores(scored_run(tmp_path / "broken", broken=12)), {}, 0, "salt") == {}


@pytest.mark.parametrize("scores", [[1e-6, 1e-3, 1.0], [0.5, 0.6, 0.7], [-1.0, 0.0, 5.0], [2.0, 2.0, 2.0]])
def test_the_bins_hold_every_score_and_the_threshold(scores: list[float]) -> None:
    edges, logarithmic = histogram_bins(np.array(scores, np.float32), threshold=2.0)
    assert logarithmic == (scores[0] == 1e-6)
    assert np.histogram(np.array([*scores, 2.0], np.float32), edges)[0].sum() == 4
