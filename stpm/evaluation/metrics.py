"""Image-level figures, on raw scores (scikit-learn). What is undefined is an error with its reason, never a number."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

Flags = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float32]


class UndefinedMetricError(ValueError):
    """A metric that these labels do not define; the message says why."""


def auroc(is_defect: Flags, scores: Scores) -> float:
    """Area under the ROC curve, by rank: the chance that a defect scores above a good one, ties counting half.

    Args:
        is_defect: any shape, true for a defect.
        scores: the same shape, larger for what is more anomalous.

    Raises:
        UndefinedMetricError: if there is only one class, or a score is not finite.
    """
    require_both_classes(is_defect, scores)
    return float(roc_auc_score(is_defect.ravel(), scores.ravel()))


def average_precision(is_defect: Flags, scores: Scores) -> float:
    """Precision averaged over the recall it is reached at, without interpolation. Arguments as for `auroc`."""
    require_both_classes(is_defect, scores)
    return float(average_precision_score(is_defect.ravel(), scores.ravel()))


def f1_max(is_defect: Flags, scores: Scores) -> float:
    """The largest F1 that any threshold reaches: an upper bound, chosen with the labels. Arguments as for `auroc`."""
    require_both_classes(is_defect, scores)
    precision, recall, _ = precision_recall_curve(is_defect.ravel(), scores.ravel())
    return float((2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)).max())


def share(chosen: Flags, of: str) -> float:
    """The share that is true: recall of the defects' verdicts, false-alarm rate of the good ones'.

    Raises:
        UndefinedMetricError: if there is none; `of` says of what.
    """
    require_some(chosen, of)
    return float(chosen.mean())


def require_some(chosen: Flags, of: str) -> None:
    """Raises UndefinedMetricError if there is none; `of` says of what."""
    if not chosen.size:
        raise UndefinedMetricError(f"no {of}")


def require_both_classes(is_defect: Flags, scores: Scores) -> None:
    """Raises UndefinedMetricError if there is only one class, or a score is not finite."""
    defects = int(is_defect.sum())
    if defects in (0, is_defect.size):
        raise UndefinedMetricError(f"no {'good' if defects else 'defective'} ones among {is_defect.size}")
    if not np.isfinite(scores).all():
        raise UndefinedMetricError("a score is not finite")
