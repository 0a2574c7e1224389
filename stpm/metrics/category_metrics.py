"""The metrics of one category: which there are, and how they are measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from tabulate import tabulate

from stpm.errors import UndefinedMetricError
from stpm.metrics.intervals import RANK_METRICS, Flags, Interval, Scores, bootstrap_intervals, wilson_interval
from stpm.metrics.labelled import LabelledScores

# Title of each metric, in the order of the report's table: first those that papers compare.
METRICS = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "pixel_aupro": "AUPRO 0.3",
    "image_recall": "recall",
    "image_false_alarm_rate": "false alarms",
    "image_average_precision": "image AP",
    "image_f1_max": "image F1-max",
    "pixel_average_precision": "pixel AP",
    "pixel_f1_max": "pixel F1-max",
    "pixel_aupro_05": "AUPRO 0.05",
}
LOWER_IS_BETTER = frozenset({"image_false_alarm_rate"})
# Largest false positive rate of each AUPRO: the customary one, and a strict one.
AUPRO_LIMITS = {"pixel_aupro": 0.3, "pixel_aupro_05": 0.05}


@dataclass(frozen=True)
class Metric:
    """A metric in [0, 1], or why it is undefined. One of images has a 95 % interval, one of pixels a largest error."""

    value: float | None = None
    interval: Interval | None = None
    max_error: float = 0.0
    undefined: str = ""


@dataclass(frozen=True, repr=False)
class CategoryMetrics:
    """Metrics of a category's labelled images, or of one defect type against all good images.

    Recall and false-alarm rate are those at the calibrated threshold. F1-max takes the best threshold,
    chosen by the labels.

    Args:
        metrics: each of METRICS.
        good_count: number of good images.
        defect_count: number of defective images.
        error_count: as in `LabelledScores`, and so are the fields up to `problems`.
        defects: metrics of each defect type.
    """

    metrics: Mapping[str, Metric]
    good_count: int
    defect_count: int
    error_count: int = 0
    unlabelled_count: int = 0
    vanished_masks: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    defects: Mapping[str, CategoryMetrics] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Write the metrics as a table, with their 95 % intervals and why one is undefined."""
        rows = []
        for name, metric in self.metrics.items():
            value = metric.undefined if metric.value is None else f"{metric.value:.4f}"
            interval = "{:.4f} to {:.4f}".format(*metric.interval) if metric.interval else ""
            rows.append((METRICS[name], value, interval))
        header = (f"{self.good_count} good, {self.defect_count} defective", "value", "95 % interval")
        # Parsed as numbers, values would lose their last zeros.
        return tabulate(rows, header, disable_numparse=True)

    @property
    def labelled_count(self) -> int:
        """The number of images with a label."""
        return self.good_count + self.defect_count + self.error_count

    @property
    def values(self) -> dict[str, float | None]:
        """The value of each metric."""
        return {name: metric.value for name, metric in self.metrics.items()}

    @property
    def undefined(self) -> dict[str, str]:
        """The reason for each metric without a value."""
        return {name: metric.undefined for name, metric in self.metrics.items() if metric.value is None}

    @property
    def pixel_error(self) -> float:
        """The largest error of any pixel metric."""
        return max(metric.max_error for metric in self.metrics.values())


def measure_category(scores: LabelledScores) -> CategoryMetrics:
    """Measure a category and each of its defect types."""
    return dataclasses.replace(
        _measure(scores),
        error_count=scores.error_count,
        unlabelled_count=scores.unlabelled_count,
        vanished_masks=scores.vanished_masks,
        problems=scores.problems,
        defects={label: _measure(scores.of_defect(label)) for label in scores.defect_types},
    )


def _measure(scores: LabelledScores) -> CategoryMetrics:
    is_defect = scores.is_defect
    metrics = {
        **_rank_metrics(is_defect, scores.scores),
        **_pixel_metrics(scores),
        "image_recall": _fraction(scores.is_anomalous[is_defect], "defective ones"),
        "image_false_alarm_rate": _fraction(scores.is_anomalous[~is_defect], "good ones"),
    }
    defects = int(is_defect.sum())
    return CategoryMetrics({name: metrics[name] for name in METRICS}, len(is_defect) - defects, defects)


def _rank_metrics(is_defect: Flags, scores: Scores) -> dict[str, Metric]:
    """Compute the metrics that depend only on the order of the scores, by scikit-learn."""
    try:
        intervals = bootstrap_intervals(is_defect, scores)
    except UndefinedMetricError as error:
        return {f"image_{name}": Metric(undefined=str(error)) for name in RANK_METRICS}
    precision, recall, _ = precision_recall_curve(is_defect, scores)
    values = {
        "auroc": roc_auc_score(is_defect, scores),
        "average_precision": average_precision_score(is_defect, scores),
        "f1_max": (2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)).max(),
    }
    return {f"image_{name}": Metric(float(value), intervals[name]) for name, value in values.items()}


def _pixel_metrics(scores: LabelledScores) -> dict[str, Metric]:
    try:
        counts = scores.pixel_counts()
        bounded = {
            "pixel_auroc": counts.auroc(),
            "pixel_average_precision": counts.average_precision(),
            "pixel_f1_max": counts.f1_max(),
            **{name: counts.aupro(limit) for name, limit in AUPRO_LIMITS.items()},
        }
    except UndefinedMetricError as error:
        return {name: Metric(undefined=str(error)) for name in METRICS if name.startswith("pixel")}
    return {name: Metric(value, max_error=error) for name, (value, error) in bounded.items()}


def _fraction(flags: Flags, name: str) -> Metric:
    if not flags.size:
        return Metric(undefined=f"no {name}")
    return Metric(float(flags.mean()), wilson_interval(flags))
