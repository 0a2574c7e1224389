"""Third stage: draw heatmaps as PNG, on the model's fixed scale, and masks; no image is rescaled to its own range.

Overlays are for people's eyes alone, and JPEG: a tenth of the bytes and of the time of a PNG.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from stpm import storage
from stpm.data.encode import encode_jpeg, encode_png
from stpm.data.heatmaps import overlay, palette_png
from stpm.method.preprocessing import Preprocessing
from stpm.scoring import prometheus
from stpm.scoring.options import OutputOptions
from stpm.scoring.output import PictureSuffix, RunOutput
from stpm.scoring.progress import BatchReport, ProgressReporter
from stpm.scoring.run_statistics import RunStatistics
from stpm.scoring.schema import OUTPUT, SCORED, table, with_passthrough

_WRITERS = 8
# Of the files of pictures, in the order of `Pictures`.
_SUFFIXES: tuple[PictureSuffix, ...] = (".png", "_overlay.jpg", "_regions.png")
# Columns that are too large to copy: they are drawn from Arrow's memory, or passed on.
_BINARY = ("heatmap_levels", "region_bits", "pixels", "anomaly_map")
# An overlay's longer side is at most this many times the longer side of the model's input.
_MAX_OVERLAY_STRETCH = 4


class Pictures(NamedTuple):
    """The columns of OUTPUT that name an image's pictures, or hold them."""

    heatmap: str = ""
    overlay: str = ""
    region_mask: str = ""
    heatmap_png: bytes | None = None
    overlay_jpeg: bytes | None = None
    region_mask_png: bytes | None = None


class DrawHeatmaps:
    """Turn SCORED rows into OUTPUT rows. Draw a palette PNG of each scored image, as a file or as bytes in its row.

    `preprocessing` is that of each category's model; `progress` gets the CPU time of each batch.
    """

    def __init__(
        self,
        output: RunOutput,
        options: OutputOptions,
        preprocessing: Mapping[str, Preprocessing],
        progress: ProgressReporter | None = None,
    ) -> None:
        self._output = output
        self._options = options
        self._preprocessing = dict(preprocessing)
        self._progress = progress

    def __call__(self, batch: pa.Table) -> pa.Table:
        began = time.process_time()
        rows = batch.select([name for name in SCORED.names if name not in _BINARY]).to_pylist()
        for name in ("heatmap_levels", "region_bits", "pixels"):
            for row, value in zip(rows, batch[name], strict=True):
                row[name] = value.as_buffer()
        pictures = storage.in_parallel(self._pictures, rows, _WRITERS)
        columns: dict[str, Any] = {name: batch[name] for name in OUTPUT.names if name in batch.schema.names}
        columns |= {name: [getattr(each, name) for each in pictures] for name in Pictures._fields}
        result = with_passthrough(table(columns, OUTPUT), batch)
        computed = time.process_time() - began
        prometheus.count_stage_seconds("draw", computed)
        prometheus.count_images(
            (row["category"] if row["model_id"] else "", row["error_kind"], bool(row["is_anomalous"])) for row in rows
        )
        if self._progress:
            self._progress.report(BatchReport("draw", RunStatistics(draw_seconds=computed)))
        return result

    def _pictures(self, row: Mapping[str, Any]) -> Pictures:
        heatmaps = self._options.heatmaps
        is_wanted = heatmaps == "all" or (heatmaps == "anomalous" and row["is_anomalous"])
        heatmap, overlaid = self._draw(row) if is_wanted and row["heatmap_levels"] else (None, None)
        pictures = heatmap, overlaid, None if row["region_bits"] is None else self._draw_mask(row)
        if self._options.heatmaps_in == "parquet":
            return Pictures("", "", "", *pictures)
        paths = [self._write(row, suffix, each) for suffix, each in zip(_SUFFIXES, pictures, strict=True)]
        return Pictures(paths[0], paths[1], paths[2])

    def _draw_mask(self, row: Mapping[str, Any]) -> bytes:
        shape = self._preprocessing[row["category"]].content_shape(row["width"], row["height"])
        bits = np.unpackbits(np.frombuffer(row["region_bits"], np.uint8), count=math.prod(shape))
        return encode_png(Image.fromarray(255 * bits.reshape(shape)), compress_level=1)

    def _draw(self, row: Mapping[str, Any]) -> tuple[bytes, bytes | None]:
        """Draw the heatmap of a row, and the overlay if there is to be one."""
        preprocessing = self._preprocessing[row["category"]]
        size = row["width"], row["height"]
        content = preprocessing.content_shape(*size)
        levels = np.frombuffer(row["heatmap_levels"], np.uint8).reshape(content)
        heatmap = palette_png(levels)
        if not self._options.overlay:
            return heatmap, None
        left, top, right, bottom = preprocessing.content_box(*size)
        pixels = np.frombuffer(row["pixels"], np.uint8).reshape(*preprocessing.input_shape, 3)
        blended = Image.fromarray(overlay(pixels[top:bottom, left:right], levels))
        longest = _MAX_OVERLAY_STRETCH * max(preprocessing.input_shape)
        resized = blended.resize(preprocessing.picture_size(*size, min(content), longest))
        return heatmap, encode_jpeg(resized)

    def _write(self, row: Mapping[str, Any], suffix: PictureSuffix, picture: bytes | None) -> str:
        """Write a picture of a row, if there is one, and return its path."""
        if picture is None:
            return ""
        path = self._output.picture_path(row["category"], row["image_id"], suffix)
        # The run syncs all files at its end: to sync one takes longer than to draw it.
        storage.publish(storage.join(self._output.folder, path), picture, durable=False)
        return path
