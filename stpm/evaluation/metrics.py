"""AUROC of images and of pixels, on raw scores. What is undefined is an error with its reason, never a number."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score


class UndefinedMetricError(ValueError):
    """A metric that these labels do not define; the message says why."""


def auroc(is_defect: npt.NDArray[np.bool_], scores: npt.NDArray[np.float32]) -> float:
    """Area under the ROC curve, by rank: the chance that a defect scores above a good one, ties counting half.

    Args:
        is_defect: any shape, true for a defect.
        scores: the same shape, larger for what is more anomalous.

    Raises:
        UndefinedMetricError: if there is only one class, or a score is not finite.
    """
    defects = int(is_defect.sum())
    if defects in (0, is_defect.size):
        raise UndefinedMetricError(f"no {'good' if defects else 'defective'} ones among {is_defect.size}")
    if not np.isfinite(scores).all():
        raise UndefinedMetricError("a score is not finite")
    return float(roc_auc_score(is_defect.ravel(), scores.ravel()))
