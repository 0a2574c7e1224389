"""One category: its labelled scores and pixel counts, which metrics there are, and how they are measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import islice
from operator import add
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tabulate import tabulate

from stpm.data.heatmaps import resize_map
from stpm.data.masks import crop_mask, read_mask, resize_mask
from stpm.data.mvtec import GOOD
from stpm.errors import DataError, UndefinedMetricError
from stpm.method.preprocessing import Preprocessing
from stpm.metrics.intervals import RANK_METRICS, Flags, Interval, Scores, rank_metrics, wilson_interval
from stpm.metrics.pixel_metrics import Map, Mask, PixelCounts, count_pixels

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
class LabelledScores:
    """The N scored images of one category that have a label: "good" or a defect type.

    Args:
        scores: larger is more anomalous.
        threshold: of the model; NaN without images.
        pixels: pixel counts by label.
        no_pixels: why there are no pixel counts, or "".
        error_count: number of images with a label that could not be scored.
        vanished_masks: URIs of masks whose defects are too small for the anomaly map: no pixel metric counts them.
        outside_masks: URIs of masks that lie wholly outside of what is inspected, likewise.
        problems: one line each.
    """

    labels: npt.NDArray[np.str_]
    scores: Scores
    is_anomalous: Flags
    threshold: float
    pixels: Mapping[str, PixelCounts]
    no_pixels: str
    error_count: int
    unlabelled_count: int
    vanished_masks: tuple[str, ...]
    outside_masks: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def is_defect(self) -> Flags:
        """True for a defect, (N,)."""
        return np.asarray(self.labels != GOOD)

    @property
    def defect_types(self) -> list[str]:
        """The labels of defects, sorted."""
        return sorted({*self.labels.tolist()} - {GOOD})

    def pixel_counts(self) -> PixelCounts:
        """Add up the counts over all labels. Raise UndefinedMetricError if there are none."""
        if self.no_pixels:
            raise UndefinedMetricError(self.no_pixels)
        return reduce(add, self.pixels.values(), PixelCounts.empty())

    def of_defect(self, defect_type: str) -> LabelledScores:
        """Select one defect type and all good images."""
        chosen = np.isin(self.labels, (GOOD, defect_type))
        return replace(
            self,
            labels=self.labels[chosen],
            scores=self.scores[chosen],
            is_anomalous=self.is_anomalous[chosen],
            pixels={label: counts for label, counts in self.pixels.items() if label in (GOOD, defect_type)},
        )


class ScoredImage(NamedTuple):
    """A labelled image: "good" or a defect type, its mask's URI or "", its size in pixels, its score, or its error."""

    uri: str
    label: str
    mask: str
    width: int
    height: int
    score: float
    is_anomalous: bool
    threshold: float
    error: str


def label_scores(
    images: Iterable[tuple[ScoredImage, Map | None]],
    preprocessing: Preprocessing,
    *,
    at_original_size: bool = False,
    batch_size: int,
    unlabelled_count: int = 0,
) -> LabelledScores:
    """Collect the scores of labelled images, and count pixels by score with `batch_size` maps in memory at a time.

    Masks are brought to the size of the anomaly maps by nearest neighbour, as the paper's authors do; or, at original
    size, maps linearly to that of the image as the model sees it. Pixels are counted if there is each map, and each
    mask of a defect can be read; one that cannot is a problem.
    """
    scored: list[ScoredImage] = []
    failed: list[str] = []
    problems: list[str] = []
    counts: dict[str, PixelCounts] = {}
    lost: dict[str, list[str]] = {"vanished": [], "outside": []}
    no_pixels = ""
    remaining = iter(images)
    while batch := list(islice(remaining, batch_size)):
        failed += [image.error for image, _ in batch if image.error]
        scored += [image for image, _ in batch if not image.error]
        by_label: dict[str, list[Sequence[Any]]] = {}
        try:
            for image, anomaly_map in () if no_pixels else batch:
                if not image.error:
                    *pair, why = _at_one_size(image, anomaly_map, preprocessing, at_original_size)
                    by_label.setdefault(image.label, []).append(pair)
                    if why:
                        lost[why].append(image.mask)
            for label, pairs in by_label.items():
                maps, masks = zip(*pairs, strict=True)
                counts[label] = counts.get(label, PixelCounts.empty()) + count_pixels(maps, masks)
        except (UndefinedMetricError, DataError) as error:
            no_pixels = str(error)
            problems += [no_pixels] if isinstance(error, DataError) else []
    given = [image.mask for image in scored if image.label != GOOD]
    if not any(given):
        no_pixels = "no masks"
    elif not all(given):
        first = min(image.uri for image in scored if image.label != GOOD and not image.mask)
        no_pixels = f"{given.count('')} of {len(given)} defects have no mask, {first} among them; add or remove masks"
        problems = [no_pixels]
    return LabelledScores(
        labels=np.array([image.label for image in scored], np.str_),
        scores=np.array([image.score for image in scored], np.float32),
        is_anomalous=np.array([image.is_anomalous for image in scored], bool),
        threshold=scored[0].threshold if scored else np.nan,
        pixels=counts,
        no_pixels=no_pixels,
        error_count=len(failed),
        unlabelled_count=unlabelled_count,
        vanished_masks=tuple(sorted(lost["vanished"])),
        outside_masks=tuple(sorted(lost["outside"])),
        problems=(*sorted(failed), *problems),
    )


def _at_one_size(
    image: ScoredImage, anomaly_map: Map | None, preprocessing: Preprocessing, at_original_size: bool
) -> tuple[Map, Mask, str]:
    """Bring an image's map and mask to one size; raise if one is missing.

    Say why nothing of a defect is left there: "vanished", it is too small; "outside", it is not inspected; or "".
    """
    if anomaly_map is None:
        raise UndefinedMetricError("no anomaly maps; score with --raw-maps")
    mask = read_mask(image.uri, image.label, image.mask, image.width, image.height)
    cropped = compared = crop_mask(mask, preprocessing)
    if at_original_size:
        anomaly_map = resize_map(anomaly_map, *cropped.shape)
    else:
        compared = resize_mask(mask, preprocessing)
    if not mask.any() or (compared & ~np.isnan(anomaly_map)).any():
        return anomaly_map, compared, ""
    return anomaly_map, compared, "vanished" if cropped.any() and not compared.any() else "outside"


@dataclass(frozen=True)
class Metric:
    """A metric in [0, 1], or why it is undefined. One of images has a 95 % interval."""

    value: float | None = None
    interval: Interval | None = None
    undefined: str = ""


@dataclass(frozen=True, repr=False)
class CategoryMetrics:
    """Metrics of a category's labelled images, or of one defect type against all good images.

    Recall and false-alarm rate are those at the calibrated threshold. F1-max takes the best threshold,
    chosen by the labels.

    Args:
        metrics: each of METRICS.
        found_count: number of defects that are anomalous.
        false_alarm_count: number of good images that are.
        error_count: as in `LabelledScores`, and so are the fields up to `problems`.
        defects: metrics of each defect type.
    """

    metrics: Mapping[str, Metric]
    good_count: int
    defect_count: int
    found_count: int
    false_alarm_count: int
    error_count: int = 0
    unlabelled_count: int = 0
    vanished_masks: tuple[str, ...] = ()
    outside_masks: tuple[str, ...] = ()
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
    def values(self) -> dict[str, float | None]:
        """The value of each metric."""
        return {name: metric.value for name, metric in self.metrics.items()}

    @property
    def undefined(self) -> dict[str, str]:
        """The reason for each metric without a value."""
        return {name: metric.undefined for name, metric in self.metrics.items() if metric.value is None}


def measure_category(scores: LabelledScores) -> CategoryMetrics:
    """Measure a category and each of its defect types."""
    return replace(
        _measure(scores),
        error_count=scores.error_count,
        unlabelled_count=scores.unlabelled_count,
        vanished_masks=scores.vanished_masks,
        outside_masks=scores.outside_masks,
        problems=scores.problems,
        defects={label: _measure(scores.of_defect(label)) for label in scores.defect_types},
    )


def _measure(scores: LabelledScores) -> CategoryMetrics:
    is_defect, found = scores.is_defect, scores.is_anomalous
    metrics = {
        **_rank_metrics(is_defect, scores.scores),
        **_pixel_metrics(scores),
        "image_recall": _fraction(found[is_defect], "defective ones"),
        "image_false_alarm_rate": _fraction(found[~is_defect], "good ones"),
    }
    good_count, defect_count, found_count, false_alarm_count = (
        int(flags.sum()) for flags in (~is_defect, is_defect, is_defect & found, ~is_defect & found)
    )
    ordered = {name: metrics[name] for name in METRICS}
    return CategoryMetrics(ordered, good_count, defect_count, found_count, false_alarm_count)


def _rank_metrics(is_defect: Flags, scores: Scores) -> dict[str, Metric]:
    try:
        return {f"image_{name}": Metric(*found) for name, found in rank_metrics(is_defect, scores).items()}
    except UndefinedMetricError as error:
        return {f"image_{name}": Metric(undefined=str(error)) for name in RANK_METRICS}


def _pixel_metrics(scores: LabelledScores) -> dict[str, Metric]:
    try:
        counts = scores.pixel_counts()
        values = {f"pixel_{name}": value for name, value in counts.rank_metrics().items()}
        values |= {name: counts.aupro(limit) for name, limit in AUPRO_LIMITS.items()}
    except UndefinedMetricError as error:
        return {name: Metric(undefined=str(error)) for name in METRICS if name.startswith("pixel")}
    return {name: Metric(value) for name, value in values.items()}


def _fraction(flags: Flags, name: str) -> Metric:
    if not flags.size:
        return Metric(undefined=f"no {name}")
    return Metric(float(flags.mean()), wilson_interval(flags))
