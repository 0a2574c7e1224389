"""Feedback: add images that a person marked as good to the calibration of models, without fitting them again."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from stpm import storage
from stpm.data import image_files
from stpm.data.image_statistics import COMPARED
from stpm.data.mvtec import GOOD
from stpm.detector import Detector, load
from stpm.errors import DataError, ImageError, ModelError, join_first
from stpm.lease import hold_lease
from stpm.method.scales import HeatmapScale
from stpm.models.libraries import installed_versions
from stpm.models.record import CALIBRATION, IMAGE_STATISTICS, AddedImage, ModelRecord
from stpm.models.store import ModelStore, describe_files
from stpm.names import safe_name
from stpm.options import WantedBackend
from stpm.scoring.inputs import tables
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.table_rows import part_rows
from stpm.scoring.inputs.table_uris import allowed_prefixes
from stpm.times import timestamp

# An image that is new to a model: a row for its calibration and image statistics, with `digest`, the SHA-256 of the
# file, and `uris`, where copies of it are.
_NewImage = dict[str, Any]
# Files that are fetched at a time.
_BATCH_SIZE = 16
# Maximum number of added images that the log names.
_NAMED = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Marks:
    """The images of a table.

    Args:
        good: by category the images that are marked as good: their URIs, with that of the mask of each one's own
            region of interest, "" for none.
        other: number of images without the label good, by each of their labels, such as `defect`.
        refused: images that are marked as good and cannot be used, by URI or row, with the reason.
    """

    good: defaultdict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    other: Counter[str] = field(default_factory=Counter)
    refused: dict[str, str] = field(default_factory=dict)


def read_marks(table: str, allow: Sequence[str] = (), categories: Sequence[str] = ()) -> Marks:
    """Read a table of marked images, each once.

    Args:
        table: URI of a `.parquet`, `.csv`, `.jsonl` or `.ndjson` file.
        allow: prefixes of the URIs that it may name; none: its own bucket or folder, as for scoring.
        categories: names of the categories to read; none: all.

    Raises:
        DataError: if the table cannot be read, or has no column `uri`.
    """
    uri = storage.absolute(table)
    if not uri.lower().endswith(tables.SUFFIXES):
        raise DataError(f"{table}: a table is a file of {', '.join(tables.SUFFIXES)}; name one")
    found: defaultdict[tuple[str, str], set[tuple[str, str, str]]] = defaultdict(set)
    first = 0
    for part in tables.read(uri):
        if "uri" not in part.schema.names:
            raise DataError(f"{table}: no column `uri`; its columns are {', '.join(part.schema.names)}")
        for row in part_rows(part, first, uri, CategoryRule(), allowed_prefixes(uri, allow)).to_pylist():
            if not categories or row["category"] in categories:
                found[row["category"], row["uri"]].add((row["label"], row["roi"], row["error_message"]))
        first += part.num_rows
    marks = Marks()
    for (category, image), rows in found.items():
        labels, rois, problems = map(sorted, map(set, zip(*rows, strict=True)))
        if GOOD not in labels:
            marks.other.update(labels)
        elif len(labels) > 1:
            marks.refused[image] = f"it is marked as {' and as '.join(map(repr, labels))}"
        elif problems[-1]:
            marks.refused[image] = problems[-1]
        else:
            marks.good[category][image] = rois[-1]
    return marks


def add_good(
    store: ModelStore, marks: Marks, false_alarm_rate: float, backend: WantedBackend, *, wait: bool
) -> tuple[int, int]:
    """Add marked images to the calibration of their categories' current models.

    The log compares the thresholds before and after at the false-alarm rate. `backend` computes features on a CPU.

    Returns:
        The number of images marked as good that the models now have, and the number of the others.

    Raises:
        ConfigError: if another run holds the store, unless `wait`.
    """
    done, refused = 0, dict(marks.refused)
    with hold_lease(store.uri, wait):
        for category, images in marks.good.items():
            problems = _add_to_category(store, category, images, false_alarm_rate, backend)
            done += len(images) - len(problems)
            refused |= problems
    if marks.other:
        counts = ", ".join(f"{number} with label {label!r}" for label, number in sorted(marks.other.items()))
        log.info(f"left out, since only images with label 'good' are added: {counts}")
    if refused:
        reasons = join_first([f"{uri}: {reason}" for uri, reason in refused.items()])
        log.error(f"left out, since they cannot be used: {len(refused)}: {reasons}")
    return done, len(refused)


def _add_to_category(
    store: ModelStore, category: str, images: Mapping[str, str], false_alarm_rate: float, backend: WantedBackend
) -> dict[str, str]:
    """Add images to a category's model; return by URI why an image cannot be added. Those added before stay."""
    try:
        detector = load(store.uri, safe_name(category, "category"), backend=backend)
        new, refused = _score_new(detector, images)
    except (DataError, ModelError) as error:
        return dict.fromkeys(images, str(error))
    if not new:
        _log(category, "none of the images is new to its model")
        return refused
    try:
        _recalibrate(store, detector.record, new, false_alarm_rate)
    except ModelError as error:
        return refused | {uri: str(error) for image in new for uri in image["uris"]}
    return refused


def _score_new(detector: Detector, images: Mapping[str, str]) -> tuple[list[_NewImage], dict[str, str]]:
    """Return the images that were not added to the detector's model before, each once; and why others cannot be."""
    before = {image.digest for image in detector.record.added_images}
    uris, copies = list(images), defaultdict[str, list[str]](list)
    refused: dict[str, str] = {}
    # Of the new images, in their order.
    rois: deque[str] = deque()

    def new_files() -> Iterator[bytes]:
        for start in range(0, len(uris), _BATCH_SIZE):
            batch = uris[start : start + _BATCH_SIZE]
            for uri, data in zip(batch, storage.in_parallel(_fetch, batch), strict=True):
                if isinstance(data, ImageError):
                    refused[uri] = str(data)
                elif (digest := storage.digest(data)) not in before:
                    copies[digest].append(uri)
                    if len(copies[digest]) == 1:
                        rois.append(images[uri])
                        yield data

    # Of each result, keep a few numbers: a map for each of many images would not fit the memory.
    outcomes = [
        result.error
        or {"score": result.score, "max_pixel": float(np.nanmax(result.model_map)), "is_added": True}
        | dict(zip(COMPARED, (*result.size, *(result.statistics or ())), strict=True))
        for result in detector.score(new_files(), rois=iter(rois.popleft, None))
    ]
    found: list[_NewImage] = []
    for (digest, same), outcome in zip(copies.items(), outcomes, strict=True):
        if isinstance(outcome, ImageError):
            refused |= dict.fromkeys(same, str(outcome))
        else:
            found.append(outcome | {"digest": digest, "uris": same})
    return found, refused


def _fetch(uri: str) -> bytes | ImageError:
    try:
        return image_files.read_uri(uri)
    except ImageError as error:
        return error


def _recalibrate(store: ModelStore, record: ModelRecord, new: Sequence[_NewImage], false_alarm_rate: float) -> None:
    """Add the scores of new images to the calibration of a category's current model, and make the result current.

    Keep the scales of the model's parts, so that no score changes, and the lower end of the heatmap scale. Its
    `good_max` rises to the largest pixel of the new images.

    Raises:
        ModelError: if a file of the current model is missing or damaged.
    """
    category, versions = record.category, store.versions(record.category)
    before, statistics = store.calibration_scores(record), store.image_statistics(record)
    after, seen = (pa.concat_tables([table, pa.Table.from_pylist(new, table.schema)]) for table in (before, statistics))
    after = after.sort_by("score")
    tables = {CALIBRATION: after, IMAGE_STATISTICS: seen}
    files = store.read_files(record) | {name: storage.encode_parquet(table) for name, table in tables.items()}
    scale = record.heatmap_scale
    changed = dataclasses.replace(
        record,
        heatmap_scale=HeatmapScale(scale.low, max([scale.good_max, *(image["max_pixel"] for image in new)])),
        fit=dataclasses.replace(record.fit, calibration_count=len(after)),
        added_images=(*record.added_images, *(AddedImage(image["digest"], image["uris"][0]) for image in new)),
        files=describe_files(files),
        library_versions=installed_versions(),
        created=timestamp(),
    )
    # Before the model becomes current: a change that the log does not tell would be hard to notice.
    _log_change(record, before, after, new, false_alarm_rate)
    if replaced := versions.describe_replaced(changed.model_id):
        _log(category, replaced)
    store.save(changed, files, versions.current.data_fingerprint)
    undo = store.roll_command(category, "--roll-back")
    _log(category, f"{changed.model_id} is now current instead of {record.model_id}. To undo this: {undo}")


def _log_change(
    record: ModelRecord, before: pa.Table, after: pa.Table, new: Sequence[_NewImage], false_alarm_rate: float
) -> None:
    """Compare two calibrations of a model by their thresholds, and by the good images that score above them."""
    was, now = (record.threshold(each["score"].to_numpy(), false_alarm_rate) for each in (before, after))
    if record.decision:
        _log(record.category, f"the threshold stays as it is: {record.decision}")
    held_out = before.filter(~before["is_added"].to_numpy())["score"].to_numpy()
    added = np.array([image["score"] for image in new], np.float32)
    above = [
        f"{(scores > was).sum()} of {len(scores)} before, {(scores > now).sum()} of {len(scores)} after"
        for scores in (held_out, added)
    ]
    _log(
        record.category,
        f"calibrated again: threshold {was:.4g} before, {now:.4g} after; held-out good images above it {above[0]}; "
        f"added good images above it {above[1]}",
    )
    # A defect that is marked as good by mistake hides all others like it.
    highest = sorted(((image["score"], image["uris"][0]) for image in new), reverse=True)[:_NAMED]
    if over := [f"{uri} ({score:.4g})" for score, uri in highest if score > was]:
        _log(record.category, f"look again at the added images that scored highest: {join_first(over)}")


def _log(category: str, message: str) -> None:
    log.info(f"{category}: {message}", extra={"category": category})
