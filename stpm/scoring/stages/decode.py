"""First stage: fetch and decode images, in CPU tasks. An image that fails becomes a row with its error."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

import pyarrow as pa

from stpm.data import images
from stpm.data.image_statistics import NAMES
from stpm.data.images import DECODING_BYTES, MAX_BYTES, Decoded
from stpm.errors import ImageError
from stpm.method.preprocessing import Preprocessing
from stpm.scoring import prometheus
from stpm.scoring.inputs import image_files
from stpm.scoring.inputs.image_files import ImageRef
from stpm.scoring.options import IMAGE_SECONDS
from stpm.scoring.progress import BatchReport, ProgressReporter
from stpm.scoring.run_statistics import RunStatistics
from stpm.scoring.schema import DECODED, MANIFEST, table, with_passthrough
from stpm.scoring.stages.outcomes import error_columns, external_errors
from stpm.scoring.stages.time_limit import run_within

_FETCHERS = 8
# Files up to this size are fetched side by side. A larger one is fetched when it is its turn to be decoded.
_SMALL_FILE_BYTES = 16 * 2**20
# After this time, an image no longer waits for its turn: the one before it may hang.
_TURN_SECONDS = 60.0
# Maximum memory of a task: its small files, and the largest file and image.
TASK_BYTES = _FETCHERS * _SMALL_FILE_BYTES + MAX_BYTES + DECODING_BYTES


class Decode:
    """Turn MANIFEST rows into DECODED rows. Fetch side by side, but decode one at a time, to bound memory.

    Args:
        preprocessing: by category; a category that is missing has no model.
        seconds: limit for fetching and decoding one image.
        fetchers: images that one task fetches at the same time.
        progress: gets the CPU time and the failures of each batch.
    """

    def __init__(
        self,
        preprocessing: Mapping[str, Preprocessing],
        seconds: float = IMAGE_SECONDS,
        fetchers: int = _FETCHERS,
        progress: ProgressReporter | None = None,
    ) -> None:
        self._progress = progress
        self._preprocessing = dict(preprocessing)
        self._seconds = seconds
        self._fetchers = fetchers

    def __call__(self, batch: pa.Table) -> pa.Table:
        began = time.process_time()
        turn = Lock()
        rows = batch.select(MANIFEST.names).to_pylist()
        tasks = [_ImageTask(row, self._preprocessing.get(row["category"]), turn) for row in rows]
        outcomes = run_within(self._seconds, self._fetchers, tasks, lambda i: tasks[i].late_error(self._seconds))
        computed = time.process_time() - began
        prometheus.count_stage_seconds("decode", computed)
        if self._progress:
            # Images that the manifest refused were not tried.
            tried = [outcome for row, outcome in zip(rows, outcomes, strict=True) if not row["error_kind"]]
            self._progress.report(
                BatchReport(
                    "decode",
                    RunStatistics(decode_seconds=computed),
                    attempted=len(tried),
                    external_errors=external_errors(tried),
                )
            )
        decoded = [outcome if isinstance(outcome, Decoded) else None for outcome in outcomes]
        columns: dict[str, Any] = {name: batch[name] for name in MANIFEST.names} | error_columns(outcomes)
        columns["pixels"] = [image.pixels.data.cast("B") if image else b"" for image in decoded]
        for name in ("width", "height", "bytes"):
            columns[name] = [getattr(image, name) if image else None for image in decoded]
        for name in NAMES:
            columns[name] = [getattr(image.statistics, name) if image else None for image in decoded]
        return with_passthrough(table(columns, DECODED), batch)


@dataclass
class _ImageTask:
    """Fetch and decode the image of one row of MANIFEST; call it in a thread.

    `preprocessing` is None if the category has no model; `turn` is held while one of a batch's images is decoded.
    """

    row: Mapping[str, Any]
    preprocessing: Preprocessing | None
    turn: Lock
    decoding_since: float = math.inf

    def __call__(self) -> Decoded | ImageError:
        row = self.row
        if row["error_kind"]:
            return ImageError(row["error_kind"], row["error_message"])
        if self.preprocessing is None:
            return ImageError("no_model", f"no model for category {row['category']!r}")
        image = ImageRef(row["uri"], row["archive_start"], row["archive_length"])
        try:
            data = _read_small(image)
            is_ours = self.turn.acquire(timeout=_TURN_SECONDS)
            try:
                data = image_files.read(image) if data is None else data
                self.decoding_since = time.monotonic()
                return images.decode(data, self.preprocessing)
            finally:
                if is_ours:
                    self.turn.release()
        except ImageError as error:
            return error

    def late_error(self, limit: float) -> ImageError:
        """Return the error of an image that took longer than the limit, in seconds."""
        # The next run tries an image again if fetching took most of the time.
        if time.monotonic() - self.decoding_since > limit / 2:
            return ImageError("decode_timeout", f"not decoded within {limit:g} s; see --image-seconds")
        return ImageError("fetch_timeout", f"not fetched and decoded within {limit:g} s; see --image-seconds")


def _read_small(image: ImageRef) -> bytes | None:
    """Read an image, or return None if its file is large."""
    try:
        return image_files.read(image, _SMALL_FILE_BYTES)
    except ImageError as error:
        if error.kind != "too_large":
            raise
        return None
