"""First stage: fetch and decode, in CPU tasks. A row that cannot be decoded goes on with its error."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from threading import Lock
from typing import Any

import pyarrow as pa

from stpm.data import images
from stpm.data.images import DECODING_BYTES, MAX_BYTES, SUSPECT_ERRORS
from stpm.errors import ImageError
from stpm.method.preprocessing import Preprocessing
from stpm.scoring import prometheus as meters
from stpm.scoring.inputs import archives
from stpm.scoring.inputs.archives import ImageRef
from stpm.scoring.options import IMAGE_SECONDS
from stpm.scoring.progress import ProgressReporter
from stpm.scoring.run_statistics import RunStatistics
from stpm.scoring.schema import DECODED, MANIFEST, table, with_passthrough
from stpm.scoring.stages.time_limit import run_within

_FETCHERS = 8
# Bytes of a file that is fetched beside others; a larger one is fetched when its turn to be decoded has come.
_BESIDE_OTHERS = 16 * 2**20
# Seconds that an image waits for its turn: the one before it may hang.
_TURN_SECONDS = 60.0
# What a task takes at most: the small files that it holds, and the largest file and image.
TASK_BYTES = _FETCHERS * _BESIDE_OTHERS + MAX_BYTES + DECODING_BYTES


class Decode:
    """MANIFEST rows to DECODED rows. Images are fetched side by side, and decoded one at a time: memory is bounded.

    Args:
        preprocessing: that of each category's model; a category that is not among them has no model.
        seconds: that fetching and decoding one image may take.
        fetchers: images that one task fetches at a time.
        report: told of the CPU time that each batch took, and of what failed; None tells nobody.
    """

    def __init__(
        self,
        preprocessing: Mapping[str, Preprocessing],
        seconds: float = IMAGE_SECONDS,
        fetchers: int = _FETCHERS,
        report: ProgressReporter | None = None,
    ) -> None:
        self._report = report
        self._preprocessing = dict(preprocessing)
        self._seconds = seconds
        self._fetchers = fetchers

    def __call__(self, batch: pa.Table) -> pa.Table:
        decoding_since: dict[int, float] = {}
        turn = Lock()
        rows = batch.select(MANIFEST.names).to_pylist()

        def decoding(i: int) -> None:
            decoding_since[i] = time.monotonic()

        tasks = [partial(self._one, row, turn, partial(decoding, i)) for i, row in enumerate(rows)]
        began = time.process_time()
        results = run_within(self._seconds, self._fetchers, tasks, lambda i: self._late(decoding_since.get(i)))
        computed = time.process_time() - began
        meters.count_stage_seconds("decode", computed)
        if self._report:
            # What the manifest refused says nothing of storage.
            tried = [r for row, r in zip(rows, results, strict=True) if not row["error_kind"]]
            errors = [f"{r.kind}: {r}" for r in tried if isinstance(r, ImageError) and r.kind in SUSPECT_ERRORS]
            self._report("decode", RunStatistics(decode_seconds=computed), len(tried), errors)
        columns: dict[str, Any] = {name: batch[name] for name in MANIFEST.names}
        good = [r if isinstance(r, images.Decoded) else None for r in results]
        columns["pixels"] = [r.pixels.data.cast("B") if r else b"" for r in good]
        for name in ("width", "height", "bytes"):
            columns[name] = [getattr(r, name) if r else None for r in good]
        columns["error_kind"] = [r.kind if isinstance(r, ImageError) else "" for r in results]
        columns["error_message"] = [str(r) if isinstance(r, ImageError) else "" for r in results]
        return with_passthrough(table(columns, DECODED), batch)

    def _one(self, row: dict[str, Any], turn: Lock, decoding: Callable[[], None]) -> images.Decoded | ImageError:
        if row["error_kind"]:
            return ImageError(row["error_kind"], row["error_message"])
        preprocessing = self._preprocessing.get(row["category"])
        if preprocessing is None:
            return ImageError("no_model", f"no model for category {row['category']!r}")
        place = ImageRef(row["uri"], row["archive_start"], row["archive_length"])
        try:
            data = _read_small(place)
            held = turn.acquire(timeout=_TURN_SECONDS)
            try:
                data = archives.read(place) if data is None else data
                decoding()
                return images.decode(data, preprocessing)
            finally:
                if held:
                    turn.release()
        except ImageError as error:
            return error

    def _late(self, decoding_since: float | None) -> ImageError:
        # What was fetched late is not to blame for what is left to decode it in.
        if decoding_since is not None and time.monotonic() - decoding_since > self._seconds / 2:
            return ImageError("too_slow", f"not decoded within {self._seconds:g} s; see --image-seconds")
        return ImageError("timeout", f"not fetched and decoded within {self._seconds:g} s; see --image-seconds")


def _read_small(place: ImageRef) -> bytes | None:
    """The bytes of an image, or None if they are many."""
    try:
        return archives.read(place, _BESIDE_OTHERS)
    except ImageError as error:
        if error.kind != "too_large":
            raise
        return None
