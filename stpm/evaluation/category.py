"""One category's figures, for one seed, from what scoring wrote and the masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from stpm import images
from stpm.errors import DataError, ImageError
from stpm.evaluation import intervals
from stpm.evaluation.curves import Curves, histogram, image_roc, pixel_pro, pixel_roc
from stpm.evaluation.intervals import Interval
from stpm.evaluation.metrics import Flags, Scores, UndefinedMetricError, auroc, average_precision, f1_max, share
from stpm.evaluation.options import MasksAt
from stpm.evaluation.pixels import Bounded, Map, Mask, PixelCounts
from stpm.mvtec import GOOD
from stpm.preprocessing import Preprocessing
from stpm.scoring.archives import read_uri
from stpm.scoring.target import Target

_COLUMNS = (
    "uri",
    "label",
    "mask",
    "score",
    "threshold",
    "is_anomalous",
    "width",
    "height",
    "error_kind",
    "error_message",
)
# A map at original size may have a hundred times as many pixels.
_MAPS_AT_ONCE = {"model": 16, "original": 1}

# Integration limits of AUPRO, as false positive rates: the customary one, and a strict one.
AUPRO_LIMITS = {"pixel_aupro": 0.3, "pixel_aupro_05": 0.05}


@dataclass(frozen=True)
class Metrics:
    """What is measured of one category, each in [0, 1], or None where it is undefined.

    Recall and false-alarm rate are the verdicts' at the calibrated threshold; F1-max takes the best threshold there is,
    chosen with the labels.
    """

    image_auroc: float | None = None
    image_average_precision: float | None = None
    image_f1_max: float | None = None
    image_recall: float | None = None
    image_false_alarm_rate: float | None = None
    pixel_auroc: float | None = None
    pixel_average_precision: float | None = None
    pixel_f1_max: float | None = None
    pixel_aupro: float | None = None
    pixel_aupro_05: float | None = None


METRICS = tuple(metric.name for metric in fields(Metrics))
PIXEL_METRICS = tuple(name for name in METRICS if name.startswith("pixel"))
# All others are better when they are larger.
SMALLER_IS_BETTER = frozenset({"image_false_alarm_rate"})


@dataclass(frozen=True)
class Measured:
    """Metrics of some good and some defective images, and how many there were.

    `undefined` has a reason for each metric that is None, `intervals` a 95 % interval for each image metric that is
    not. `pixel_error` is the largest error that any pixel metric may have.
    """

    metrics: Metrics
    good_count: int
    defect_count: int
    pixel_error: float = 0.0
    undefined: dict[str, str] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class Figures(Measured):
    """Of a whole category, and of each defect type against all good images; what did not count, and what went wrong."""

    error_count: int = 0
    unlabelled_count: int = 0
    problems: tuple[str, ...] = ()
    defects: dict[str, Measured] = field(default_factory=dict)
    curves: Curves = field(default_factory=Curves)


def read_rows(target: Target, category: str, columns: Sequence[str] = _COLUMNS) -> pa.Table:
    """The rows of one category that one pass wrote, sorted by URI."""
    rows = target.dataset().to_table(columns=list(columns), filter=ds.field("category") == category)
    return rows.sort_by("uri")


def evaluate(target: Target, category: str, preprocessing: Preprocessing, masks_at: MasksAt = "model") -> Figures:
    """The figures of one category.

    Args:
        target: the pass that scored the category's test images; pixel metrics need its raw maps.
        category: its name.
        preprocessing: that of the category's model.
        masks_at: where pixels are compared. `model`: masks are brought to model size by nearest neighbour, as the
            paper's authors do. `original`: maps are brought linearly to the size of what the model saw.
    """
    every = read_rows(target, category)
    rows = every.filter(pc.not_equal(every["label"], ""))
    good_rows = pc.equal(rows["error_kind"], "")
    scored, failed = rows.filter(good_rows), rows.filter(pc.invert(good_rows))
    problems = [f"{r['uri']}: {r['error_kind']}: {r['error_message']}" for r in failed.to_pylist()]
    labels = np.array(scored["label"].to_pylist(), object)
    scores = scored["score"].to_numpy().astype(np.float32)
    verdicts = np.array(scored["is_anomalous"].to_pylist(), bool)
    pixels: dict[str, PixelCounts] = {}
    why_not = ""
    try:
        pixels = _pixel_counts(target, category, scored, preprocessing, masks_at)
    except (UndefinedMetricError, DataError) as error:
        why_not = str(error)
        problems += [why_not] if isinstance(error, DataError) else []

    def measured(types: set[str]) -> Measured:
        chosen = np.array([label in types or label == GOOD for label in labels], bool)
        counts = [of for label, of in pixels.items() if label in types or label == GOOD]
        return _measured(labels[chosen] != GOOD, scores[chosen], verdicts[chosen], counts, why_not)

    types = set(labels.tolist()) - {GOOD}
    whole = measured(types)
    drawn: dict[str, Any] = {}
    if whole.metrics.image_auroc is not None:
        drawn["image_roc"] = image_roc(labels != GOOD, scores)
    if whole.metrics.pixel_auroc is not None:
        everything = reduce(add, pixels.values())
        drawn |= {"pixel_roc": pixel_roc(everything), "pixel_pro": pixel_pro(everything, AUPRO_LIMITS["pixel_aupro"])}
    if len(scores):
        drawn["scores"] = histogram(scores, labels.tolist(), scored["threshold"][0].as_py())
    return Figures(
        **vars(whole),
        error_count=failed.num_rows,
        unlabelled_count=every.num_rows - rows.num_rows,
        problems=tuple(problems),
        defects={name: measured({name}) for name in sorted(types)},
        curves=Curves(**drawn),
    )


def _measured(
    is_defect: Flags, scores: Scores, verdicts: Flags, counts: Sequence[PixelCounts], why_not: str
) -> Measured:
    """Every metric that is defined; `counts` add up to all pixels, `why_not` is why there are none."""
    measures: dict[str, Callable[[], float]] = {
        "image_auroc": lambda: auroc(is_defect, scores),
        "image_average_precision": lambda: average_precision(is_defect, scores),
        "image_f1_max": lambda: f1_max(is_defect, scores),
        "image_recall": lambda: share(verdicts[is_defect], "defective ones"),
        "image_false_alarm_rate": lambda: share(verdicts[~is_defect], "good ones"),
    }
    values: dict[str, float] = {}
    undefined: dict[str, str] = {}
    for name, measure in measures.items():
        try:
            values[name] = measure()
        except UndefinedMetricError as error:
            undefined[name] = str(error)
    bounds: dict[str, Interval] = {}
    if "image_auroc" in values:
        bounds |= {f"image_{name}": ends for name, ends in intervals.bootstrapped(is_defect, scores).items()}
    if "image_recall" in values:
        bounds["image_recall"] = intervals.of_share(verdicts[is_defect], "defective ones")
    if "image_false_alarm_rate" in values:
        bounds["image_false_alarm_rate"] = intervals.of_share(verdicts[~is_defect], "good ones")
    figures, reason = _pixel_figures(counts, why_not)
    values |= {name: figure.value for name, figure in figures.items()}
    undefined |= dict.fromkeys(PIXEL_METRICS, reason) if reason else {}
    bound = max((figure.error for figure in figures.values()), default=0.0)
    defects = int(is_defect.sum())
    return Measured(Metrics(**values), len(is_defect) - defects, defects, bound, undefined, bounds)


def _pixel_figures(parts: Sequence[PixelCounts], why_not: str) -> tuple[dict[str, Bounded], str]:
    """All pixel metrics, or none and the reason."""
    if why_not:
        return {}, why_not
    counts = reduce(add, parts, PixelCounts.empty())
    try:
        figures = {
            "pixel_auroc": counts.auroc(),
            "pixel_average_precision": counts.average_precision(),
            "pixel_f1_max": counts.f1_max(),
        }
        return figures | {name: counts.aupro(limit) for name, limit in AUPRO_LIMITS.items()}, ""
    except UndefinedMetricError as error:
        return {}, str(error)


def _pixel_counts(
    target: Target, category: str, scored: pa.Table, preprocessing: Preprocessing, masks_at: MasksAt
) -> dict[str, PixelCounts]:
    """By label, over all pixels of its images; a few maps in memory at a time."""
    of_uri: dict[str, dict[str, Any]] = {row["uri"]: row for row in scored.to_pylist()}
    without = [row["uri"] for row in of_uri.values() if row["label"] != GOOD and not row["mask"]]
    defects = sum(row["label"] != GOOD for row in of_uri.values())
    if len(without) == defects:
        raise UndefinedMetricError("no masks")
    if without:
        raise DataError(
            f"{len(without)} of {defects} defects have no mask, {without[0]} among them; add or remove masks"
        )
    counts: dict[str, PixelCounts] = {}
    for rows in _map_rows(target, category, _MAPS_AT_ONCE[masks_at]):
        by_label: dict[str, list[tuple[Map, Mask]]] = {}
        for row in rows:
            known = of_uri[row["uri"]]
            if row["anomaly_map"] is None:
                raise UndefinedMetricError("no anomaly maps; score with --raw-maps")
            shape = preprocessing.content_shape(known["width"], known["height"])
            anomaly_map = np.frombuffer(row["anomaly_map"], np.float32).reshape(shape)
            by_label.setdefault(known["label"], []).append(_compared(anomaly_map, known, preprocessing, masks_at))
        for label, pairs in by_label.items():
            maps, masks = zip(*pairs, strict=True)
            counts[label] = counts.get(label, PixelCounts.empty()) + PixelCounts.of(maps, masks)
    return counts


def _map_rows(target: Target, category: str, at_once: int) -> Iterator[list[dict[str, Any]]]:
    chosen = (ds.field("category") == category) & (ds.field("error_kind") == "") & (ds.field("label") != "")
    for batch in target.dataset().to_batches(["uri", "anomaly_map"], filter=chosen, batch_size=at_once):
        yield batch.to_pylist()


def _compared(
    anomaly_map: Map, row: Mapping[str, Any], preprocessing: Preprocessing, masks_at: MasksAt
) -> tuple[Map, Mask]:
    """A map and its mask at one size."""
    mask = ground_truth(row)
    if masks_at == "model":
        return anomaly_map, images.resize_mask(mask, preprocessing)
    cropped = images.crop_mask(mask, preprocessing)
    return images.resize_map(anomaly_map, *cropped.shape), cropped


def ground_truth(row: Mapping[str, Any]) -> npt.NDArray[np.bool_]:
    """The mask of a row's image, (height, width); empty for a good one, or where none is known.

    Raises:
        DataError: if it cannot be read, or is of another size than its image.
    """
    shape = (row["height"], row["width"])
    if row["label"] == GOOD or not row["mask"]:
        return np.zeros(shape, bool)
    try:
        mask = images.decode_mask(read_uri(row["mask"]))
    except ImageError as error:
        raise DataError(f"mask {row['mask']} cannot be read: {error}") from error
    if mask.shape != shape:
        height, width = mask.shape
        raise DataError(
            f"mask {row['mask']} is {width}×{height}, its image {row['uri']} {row['width']}×{row['height']}"
        )
    return mask
