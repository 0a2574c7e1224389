"""First stage: fetch and decode, in CPU tasks. A row that cannot be decoded goes on with its error."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyarrow as pa

from stpm import images
from stpm.errors import ImageError
from stpm.preprocessing import Preprocessing
from stpm.scoring import archives, meters
from stpm.scoring.archives import Place
from stpm.scoring.options import IMAGE_SECONDS
from stpm.scoring.progress import Done
from stpm.scoring.schema import DECODED, MANIFEST, table, with_carried
from stpm.scoring.time_limit import run_within

_FETCHERS = 8


class Decode:
    """MANIFEST rows to DECODED rows.

    Args:
        preprocessing: that of each category's model; a category that is not among them has no model.
        seconds: that fetching and decoding one image may take.
        fetchers: images that one task fetches at a time.
        report: told of the CPU time that each batch took; None tells nobody.
    """

    def __init__(
        self,
        preprocessing: Mapping[str, Preprocessing],
        seconds: float = IMAGE_SECONDS,
        fetchers: int = _FETCHERS,
        report: Callable[[Done], None] | None = None,
    ) -> None:
        self._report = report
        self._preprocessing = dict(preprocessing)
        self._seconds = seconds
        self._fetchers = fetchers

    def __call__(self, batch: pa.Table) -> pa.Table:
        tasks = [partial(self._one, row) for row in batch.to_pylist()]
        late: images.Decoded | ImageError = ImageError(
            "timeout", f"not fetched and decoded within {self._seconds:g} s; see --image-seconds"
        )
        began = time.process_time()
        results = run_within(self._seconds, self._fetchers, tasks, late)
        computed = time.process_time() - began
        meters.spent("decode", computed)
        if self._report:
            self._report(Done(decode_seconds=computed))
        columns: dict[str, Any] = {name: batch[name] for name in MANIFEST.names}
        good = [r if isinstance(r, images.Decoded) else None for r in results]
        columns["pixels"] = [r.pixels.data.cast("B") if r else b"" for r in good]
        for name in ("width", "height", "bytes"):
            columns[name] = [getattr(r, name) if r else None for r in good]
        columns["error_kind"] = [r.kind if isinstance(r, ImageError) else "" for r in results]
        columns["error_message"] = [str(r) if isinstance(r, ImageError) else "" for r in results]
        return with_carried(table(columns, DECODED), batch)

    def _one(self, row: dict[str, Any]) -> images.Decoded | ImageError:
        if row["error_kind"]:
            return ImageError(row["error_kind"], row["error_message"])
        preprocessing = self._preprocessing.get(row["category"])
        if preprocessing is None:
            return ImageError("no_model", f"no model for category {row['category']!r}")
        try:
            data = archives.read(Place(row["uri"], row["archive_start"], row["archive_length"]))
            return images.decode(data, preprocessing)
        except ImageError as error:
            return error
        except FileNotFoundError:
            return ImageError("missing", "no such file")
        except OSError as error:
            return ImageError("unreadable", str(error))
