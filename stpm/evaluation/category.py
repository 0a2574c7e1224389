"""One category's figures, for one seed, from what scoring wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from stpm import images, storage
from stpm.errors import DataError, ImageError
from stpm.evaluation.metrics import UndefinedMetricError, auroc
from stpm.mvtec import GOOD
from stpm.scoring.pipeline import Target
from stpm.scoring.schema import OUTPUT

_COLUMNS = (
    "uri",
    "label",
    "mask",
    "score",
    "width",
    "height",
    "overlay",
    "error_kind",
    "error_message",
    "anomaly_map",
)


@dataclass(frozen=True)
class Figures:
    """AUROCs in [0, 1], or None with the reason in `undefined`; counts of test images; and what went wrong."""

    image_auroc: float | None
    pixel_auroc: float | None
    good_count: int
    defect_count: int
    error_count: int
    undefined: dict[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def read_rows(target: Target, category: str, columns: Sequence[str] = _COLUMNS) -> pa.Table:
    """The rows of one category that one pass wrote, sorted by URI."""
    filesystem, folder = storage.arrow_filesystem(target.scores)
    paths = [f"{folder}/{uri.rsplit('/', 1)[-1]}" for uri in target.files()]
    if not paths:
        return pa.schema([OUTPUT.field(name) for name in columns]).empty_table()
    rows = ds.dataset(paths, filesystem=filesystem, format="parquet").to_table(
        columns=list(columns), filter=ds.field("category") == category
    )
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
    undefined: dict[str, str] = {}
    problems = [
        f"{r['uri']}: {r['error_kind']}: {r['error_message']}"
        for r in rows.filter(pc.not_equal(rows["error_kind"], ""))
        .select(["uri", "error_kind", "error_message"])
        .to_pylist()
    ]

    def measured(name: str, measure: Callable[[], float]) -> float | None:
        try:
            return measure()
        except UndefinedMetricError as error:
            undefined[name] = str(error)
        except DataError as error:
            undefined[name] = str(error)
            problems.append(str(error))
        return None

    return Figures(
        image_auroc=measured("image_auroc", lambda: auroc(is_defect, scores)),
        pixel_auroc=measured("pixel_auroc", lambda: _pixel_auroc(scored, view)),
        good_count=int((~is_defect).sum()),
        defect_count=int(is_defect.sum()),
        error_count=rows.num_rows - scored.num_rows,
        undefined=undefined,
        problems=tuple(problems),
    )


def _pixel_auroc(scored: pa.Table, view: images.View) -> float:
    """Over all pixels of the good images and of the defects."""
    images_of_interest: list[dict[str, Any]] = scored.select(["uri", "label", "mask", "width", "height"]).to_pylist()
    without = [row["uri"] for row in images_of_interest if row["label"] != GOOD and not row["mask"]]
    defects = sum(row["label"] != GOOD for row in images_of_interest)
    if len(without) == defects:
        raise UndefinedMetricError("no masks")
    if without:
        raise DataError(
            f"{len(without)} of {defects} defects have no mask, {without[0]} among them; add or remove masks"
        )
    truth = np.stack([_ground_truth(row, view) for row in images_of_interest])
    maps = np.stack(
        [np.frombuffer(m.as_buffer(), np.float32).reshape(view.size, view.size) for m in scored["anomaly_map"]]
    )
    return auroc(truth, maps)


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
