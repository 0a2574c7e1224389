"""One category's figures, for one seed, from what scoring wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from stpm import images, storage
from stpm.errors import DataError, ImageError
from stpm.evaluation.metrics import UndefinedMetricError, auroc, average_precision, f1_max, share
from stpm.evaluation.pixels import Bounded, PixelCounts
from stpm.mvtec import GOOD
from stpm.scoring.target import Target

_COLUMNS = (
    "uri",
    "label",
    "mask",
    "score",
    "is_anomalous",
    "width",
    "height",
    "error_kind",
    "error_message",
)
_MAPS_AT_ONCE = 16

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


@dataclass(frozen=True)
class Figures:
    """Metrics, with a reason in `undefined` for each that is None; counts of test images; and what went wrong.

    `pixel_error` is the largest error that any pixel metric may have.
    """

    metrics: Metrics
    good_count: int
    defect_count: int
    error_count: int
    pixel_error: float = 0.0
    undefined: dict[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def read_rows(target: Target, category: str, columns: Sequence[str] = _COLUMNS) -> pa.Table:
    """The rows of one category that one pass wrote, sorted by URI."""
    rows = target.dataset().to_table(columns=list(columns), filter=ds.field("category") == category)
    return rows.sort_by("uri")


def evaluate(target: Target, category: str, view: images.View) -> Figures:
    """The figures of one category.

    Pixels are compared at model size: masks are brought to it by nearest neighbour.

    Args:
        target: the pass that scored the category's test images, with raw maps.
        category: its name.
        view: what the model saw of each image.
    """
    rows = read_rows(target, category)
    scored = rows.filter(pc.equal(rows["error_kind"], ""))
    is_defect = np.array([label != GOOD for label in scored["label"].to_pylist()], bool)
    scores = scored["score"].to_numpy().astype(np.float32)
    verdicts = np.array(scored["is_anomalous"].to_pylist(), bool)
    problems = [
        f"{r['uri']}: {r['error_kind']}: {r['error_message']}"
        for r in rows.filter(pc.not_equal(rows["error_kind"], ""))
        .select(["uri", "error_kind", "error_message"])
        .to_pylist()
    ]
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
    error_bound = 0.0
    try:
        pixels = _pixel_figures(_pixel_counts(target, category, scored, view))
    except (UndefinedMetricError, DataError) as error:
        undefined |= {name: str(error) for name in METRICS if name.startswith("pixel")}
        problems += [str(error)] if isinstance(error, DataError) else []
    else:
        values |= {name: figure.value for name, figure in pixels.items()}
        error_bound = max(figure.error for figure in pixels.values())
    return Figures(
        metrics=Metrics(**values),
        good_count=int((~is_defect).sum()),
        defect_count=int(is_defect.sum()),
        error_count=rows.num_rows - scored.num_rows,
        pixel_error=error_bound,
        undefined=undefined,
        problems=tuple(problems),
    )


def _pixel_figures(counts: PixelCounts) -> dict[str, Bounded]:
    return {
        "pixel_auroc": counts.auroc(),
        "pixel_average_precision": counts.average_precision(),
        "pixel_f1_max": counts.f1_max(),
    } | {name: counts.aupro(limit) for name, limit in AUPRO_LIMITS.items()}


def _pixel_counts(target: Target, category: str, scored: pa.Table, view: images.View) -> PixelCounts:
    """Over all pixels of the good images and of the defects, a few maps in memory at a time."""
    of_uri: dict[str, dict[str, Any]] = {row["uri"]: row for row in scored.to_pylist()}
    without = [row["uri"] for row in of_uri.values() if row["label"] != GOOD and not row["mask"]]
    defects = sum(row["label"] != GOOD for row in of_uri.values())
    if len(without) == defects:
        raise UndefinedMetricError("no masks")
    if without:
        raise DataError(
            f"{len(without)} of {defects} defects have no mask, {without[0]} among them; add or remove masks"
        )
    counts = PixelCounts.empty()
    chosen = (ds.field("category") == category) & (ds.field("error_kind") == "")
    for batch in target.dataset().to_batches(["uri", "anomaly_map"], filter=chosen, batch_size=_MAPS_AT_ONCE):
        if batch.num_rows:
            maps = [
                np.frombuffer(m.as_buffer(), np.float32).reshape(view.size, view.size) for m in batch["anomaly_map"]
            ]
            truth = [_ground_truth(of_uri[uri], view) for uri in batch["uri"].to_pylist()]
            counts += PixelCounts.of(np.stack(maps), np.stack(truth))
    return counts


def _ground_truth(row: dict[str, Any], view: images.View) -> npt.NDArray[np.bool_]:
    if row["label"] == GOOD:
        return np.zeros((view.size, view.size), bool)
    try:
        mask = images.decode_mask(storage.read(row["mask"]))
    except (ImageError, OSError) as error:
        raise DataError(f"mask {row['mask']} cannot be read: {error}") from error
    if mask.shape != (row["height"], row["width"]):
        height, width = mask.shape
        raise DataError(
            f"mask {row['mask']} is {width}×{height}, its image {row['uri']} {row['width']}×{row['height']}"
        )
    return images.resize_mask(mask, view)
