"""First stage: fetch and decode images, in CPU tasks. An image that fails becomes a row with its error."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import islice
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import pyarrow as pa
import ray

from stpm.data import decoding, image_files
from stpm.data.decoding import DECODING_BYTES, MAX_BYTES, Decoded
from stpm.data.image_files import ImageRef
from stpm.data.image_statistics import NAMES
from stpm.data.rois import read_roi
from stpm.errors import ImageError
from stpm.method.preprocessing import Preprocessing
from stpm.method.roi import Roi
from stpm.scoring import prometheus
from stpm.scoring.options import IMAGE_SECONDS
from stpm.scoring.progress import BatchReport, ProgressReporter
from stpm.scoring.run_statistics import RunStatistics
from stpm.scoring.schema import DECODED, MANIFEST, error_columns, external_errors, table, with_passthrough
from stpm.scoring.stages.decoding_child import check_in_child, timeout_error

_FETCHERS = 8
# From this repetition of a task on, an image may have crashed its process: decode each in a child process first.
_REPETITION_IN_CHILD = 2
# Maximum memory of a task: its small files, and the largest file and image. A child process takes its own.
TASK_BYTES = _FETCHERS * image_files.SMALL_BYTES + MAX_BYTES + DECODING_BYTES

T = TypeVar("T")
Outcome = Decoded | ImageError
# The bytes of an image, None if it is large, and its own region of interest, if it has one.
Small = tuple[bytes | None, Roi | None]


def times_repeated() -> int:
    """Return how often Ray has repeated the task that this process runs; 0 outside of one."""
    if not ray.is_initialized():
        return 0
    return int(ray._private.worker.global_worker.core_worker.get_current_task_attempt_number())


class Decode:
    """Turn MANIFEST rows into DECODED rows. Fetch side by side, but decode one at a time, to bound memory.

    Args:
        preprocessing: by category; a category that is missing has no model.
        seconds: limit for fetching one image, and again for decoding it.
        fetchers: images that one task fetches at the same time.
        progress: gets the CPU time and the failures of each batch.
        repetitions: returns how often Ray has repeated the current task.
    """

    def __init__(
        self,
        preprocessing: Mapping[str, Preprocessing],
        seconds: float = IMAGE_SECONDS,
        fetchers: int = _FETCHERS,
        progress: ProgressReporter | None = None,
        repetitions: Callable[[], int] = times_repeated,
    ) -> None:
        self._preprocessing = dict(preprocessing)
        self._seconds = seconds
        self._fetchers = fetchers
        self._progress = progress
        self._repetitions = repetitions

    def __call__(self, batch: pa.Table) -> pa.Table:
        began = time.process_time()
        rows = batch.select(MANIFEST.names).to_pylist()
        outcomes = self._outcomes(rows)
        computed = time.process_time() - began
        prometheus.count_stage_seconds("decode", computed)
        if self._progress:
            # Images that the manifest refused were not tried.
            tried = [outcome for row, outcome in zip(rows, outcomes, strict=True) if not row["error_kind"]]
            statistics = RunStatistics(decode_seconds=computed)
            self._progress.report(BatchReport("decode", statistics, len(tried), external_errors(tried)))
        decoded = [outcome if isinstance(outcome, Decoded) else None for outcome in outcomes]
        columns: dict[str, Any] = {name: batch[name] for name in MANIFEST.names} | error_columns(outcomes)
        columns["pixels"] = [image.pixels.data.cast("B") if image else b"" for image in decoded]
        columns["inspected"] = [image.inspected if image else b"" for image in decoded]
        for name in ("width", "height", "bytes"):
            columns[name] = [getattr(image, name) if image else None for image in decoded]
        for name in NAMES:
            columns[name] = [getattr(image.statistics, name) if image else None for image in decoded]
        return with_passthrough(table(columns, DECODED), batch)

    def _outcomes(self, rows: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        """Fetch and decode the images of MANIFEST rows, each as soon as it is fetched."""
        outcomes: dict[int, Outcome] = {}
        for i, row in enumerate(rows):
            if row["error_kind"]:
                outcomes[i] = ImageError(row["error_kind"], row["error_message"])
            elif row["category"] not in self._preprocessing:
                outcomes[i] = ImageError("no_model", f"no model for category {row['category']!r}")
        in_child = self._repetitions() >= _REPETITION_IN_CHILD
        waiting = iter([i for i in range(len(rows)) if i not in outcomes])
        # The row of each image that is being fetched, and when it is late.
        fetches: dict[Future[Small], tuple[int, float]] = {}
        while len(outcomes) < len(rows):
            for i in islice(waiting, self._fetchers - len(fetches)):
                fetch = _in_thread(_fetch_small, rows[i])
                fetches[fetch] = i, time.monotonic() + self._seconds
            until_late = min(late for _, late in fetches.values()) - time.monotonic()
            done, _ = wait(fetches, max(until_late, 0.0), FIRST_COMPLETED)
            if done:
                fetch = done.pop()
                i, _ = fetches.pop(fetch)
                outcomes[i] = self._decode(rows[i], fetch, in_child)
            now = time.monotonic()
            for fetch in [fetch for fetch, (_, late) in fetches.items() if late <= now and not fetch.done()]:
                i, _ = fetches.pop(fetch)
                # The next run tries it again.
                outcomes[i] = timeout_error("fetch", self._seconds)
        return [outcomes[i] for i in range(len(rows))]

    def _decode(self, row: Mapping[str, Any], fetch: Future[Small], in_child: bool) -> Outcome:
        preprocessing = self._preprocessing[row["category"]]
        try:
            data, roi = fetch.result()
            if data is None:
                data = self._in_time("fetch", _in_thread(image_files.read, ImageRef.of_row(row)))
            if in_child:
                check_in_child(data, preprocessing, self._seconds)
            return self._in_time("decode", _in_thread(decoding.decode, data, preprocessing, roi))
        except ImageError as error:
            # Without its traceback, which would keep the file's bytes as long as the error.
            return ImageError(error.kind, str(error))

    def _in_time(self, step: str, result: Future[T]) -> T:
        wait([result], self._seconds)
        if not result.done():
            raise timeout_error(step, self._seconds)
        return result.result()


def _fetch_small(row: Mapping[str, Any]) -> Small:
    return image_files.read_small(ImageRef.of_row(row)), read_roi(row["roi"]) if row["roi"] else None


# What each idle thread of `_in_thread` waits on for its next call. To start a thread for each image, and to give it
# memory of its own, takes a tenth of the time of decoding a small one.
_idle: list[SimpleQueue[Callable[[], None]]] = []


def _in_thread(function: Callable[..., T], *arguments: object) -> Future[T]:
    """Call a function in a thread, which nobody can stop if it hangs: it stays behind, and ends with the process."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # noqa: BLE001
            future.set_exception(error)

    try:
        calls = _idle.pop()
    except IndexError:
        calls = SimpleQueue()
        # Unlike an executor's threads, a daemon lets the process end.
        Thread(target=_serve, args=[calls], name="image", daemon=True).start()
    calls.put(call)
    return future


def _serve(calls: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        calls.get()()
        _idle.append(calls)
