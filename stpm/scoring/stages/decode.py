"""First stage: fetch and decode images, in CPU tasks. An image that fails becomes a row with its error."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition
from typing import Any

import pyarrow as pa

from stpm.data import decoding, image_files
from stpm.data.decoding import DECODING_BYTES, MAX_BYTES, Decoded
from stpm.data.image_files import ImageRef
from stpm.data.image_statistics import NAMES
from stpm.errors import ImageError
from stpm.method.preprocessing import Preprocessing
from stpm.scoring import prometheus
from stpm.scoring.options import IMAGE_SECONDS
from stpm.scoring.progress import BatchReport, ProgressReporter
from stpm.scoring.run_statistics import RunStatistics
from stpm.scoring.schema import DECODED, MANIFEST, table, with_passthrough
from stpm.scoring.stages.decoding_child import check_in_child
from stpm.scoring.stages.outcomes import error_columns, external_errors, timeout_error
from stpm.scoring.stages.time_limit import run_within

_FETCHERS = 8
# From this repetition of a task on, try each image in a child process: an image may have crashed the task's process.
_CAREFUL_FROM = 2
# Maximum memory of a task: its small files, and the largest file and image. A child process takes its own.
TASK_BYTES = _FETCHERS * image_files.SMALL_BYTES + MAX_BYTES + DECODING_BYTES


class Decode:
    """Turn MANIFEST rows into DECODED rows. Fetch side by side, but decode one at a time, to bound memory.

    Args:
        preprocessing: by category; a category that is missing has no model.
        seconds: limit for fetching one image, and again for decoding it. Waiting for the others does not count.
        fetchers: images that one task fetches at the same time.
        progress: gets the CPU time and the failures of each batch.
        count_repetitions: returns how often Ray has repeated the task that calls this.
    """

    def __init__(
        self,
        preprocessing: Mapping[str, Preprocessing],
        seconds: float = IMAGE_SECONDS,
        fetchers: int = _FETCHERS,
        progress: ProgressReporter | None = None,
        count_repetitions: Callable[[], int] = lambda: 0,
    ) -> None:
        self._progress = progress
        self._count_repetitions = count_repetitions
        self._preprocessing = dict(preprocessing)
        self._seconds = seconds
        self._fetchers = fetchers

    def __call__(self, batch: pa.Table) -> pa.Table:
        began = time.process_time()
        turn = _Turn()
        rows = batch.select(MANIFEST.names).to_pylist()
        careful = self._count_repetitions() >= _CAREFUL_FROM
        tasks = [
            _ImageTask(row, self._preprocessing.get(row["category"]), turn, self._seconds, careful) for row in rows
        ]
        outcomes = run_within(self._fetchers, tasks)
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


class _Turn:
    """Let one image of a batch be decoded at a time."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._holder: object = None

    @contextmanager
    def taken_by(self, holder: object) -> Iterator[None]:
        """Wait for the turn, and hold it during the block."""
        with self._changed:
            self._changed.wait_for(lambda: self._holder is None)
            self._holder = holder
        try:
            yield
        finally:
            self.give_back(holder)

    def give_back(self, holder: object) -> None:
        """Give the turn to the next, if this is its holder."""
        with self._changed:
            if self._holder is holder:
                self._holder = None
                self._changed.notify()


@dataclass(eq=False)
class _ImageTask:
    """Fetch and decode the image of one row of MANIFEST; call it in a thread.

    `preprocessing` is None if the category has no model; `turn` is held while one of a batch's images is decoded;
    `limit` is that of each step, in seconds; with `careful` a child process decodes the image first.
    """

    row: Mapping[str, Any]
    preprocessing: Preprocessing | None
    turn: _Turn
    limit: float
    careful: bool
    _step: str = "fetch"
    # When the step began; infinity: it waits.
    _since: float = math.inf
    _is_late: bool = False

    def __call__(self) -> Decoded | ImageError:
        row = self.row
        if row["error_kind"]:
            return ImageError(row["error_kind"], row["error_message"])
        if self.preprocessing is None:
            return ImageError("no_model", f"no model for category {row['category']!r}")
        image = ImageRef.of_row(row)
        try:
            self._begin("fetch")
            data = image_files.read_small(image)
            self._since = math.inf
            with self.turn.taken_by(self):
                if self._is_late:
                    # Nobody would give back its turn for it.
                    return self._late_error()
                if data is None:
                    self._begin("fetch")
                    data = image_files.read(image)
                if self.careful:
                    # The child has a time limit of its own.
                    self._since = math.inf
                    check_in_child(data, self.preprocessing, self.limit)
                self._begin("decode")
                return decoding.decode(data, self.preprocessing)
        except ImageError as error:
            return error

    def _begin(self, step: str) -> None:
        self._step, self._since = step, time.monotonic()

    def seconds_left(self) -> float:
        return self.limit + min(self._since - time.monotonic(), 0.0)

    def late(self) -> ImageError:
        self._is_late = True
        error = self._late_error()
        self.turn.give_back(self)
        return error

    def _late_error(self) -> ImageError:
        # The next run tries an image again that was not fetched.
        return timeout_error(self._step, self.limit)
