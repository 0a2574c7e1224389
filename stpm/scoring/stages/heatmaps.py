"""Third stage: from grey levels to PNG files. The scale was fixed with the model; nothing here looks at a range."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from stpm import storage
from stpm.data.images import Pixels
from stpm.method.preprocessing import Preprocessing
from stpm.scoring import prometheus as meters
from stpm.scoring.output import RunOutput
from stpm.scoring.progress import ProgressReporter
from stpm.scoring.run_statistics import RunStatistics
from stpm.scoring.schema import OUTPUT, SCORED, table, with_passthrough

_WRITERS = 8
_NO_PICTURES: dict[str, Any] = {"heatmap": "", "overlay": "", "heatmap_png": None, "overlay_png": None}
# Never copied: drawn from where they are, or passed on.
_BINARY = ("heat", "pixels", "anomaly_map")
_LONGEST_FOLDER = 200
# Each of these characters takes up to twelve bytes when it is encoded.
_KEPT_OF_FOLDER = 12
# Of zlib: one tenth of the time of the default, for files a fifth larger.
_COMPRESSION = 1
# In units of the input's longer side: what a long image may be drawn out to.
_LONGEST_OVERLAY = 4


def jet_palette() -> npt.NDArray[np.uint8]:
    """(256, 3) RGB from blue over green to red: piecewise linear, as the colour map of that name."""
    x = np.linspace(0.0, 1.0, 256)
    rgb = np.stack([1.5 - np.abs(4 * x - centre) for centre in (3.0, 2.0, 1.0)], axis=1)
    return np.round(np.clip(rgb, 0.0, 1.0) * 255).astype(np.uint8)


_PALETTE = jet_palette()


def palette_png(heat: Pixels) -> bytes:
    """A heatmap as a palette PNG; the index of a pixel is its grey level.

    Args:
        heat: (H, W) uint8.
    """
    image = Image.frombytes("P", heat.shape[::-1], heat.tobytes())
    image.putpalette(_PALETTE.tobytes())
    return _png(image)


def overlay(pixels: Pixels, heat: Pixels) -> Pixels:
    """(H, W, 3) uint8 RGB: an image with its heatmap over it at half opacity.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        heat: (H, W) uint8.
    """
    return ((pixels + _PALETTE[heat].astype(np.uint16) + 1) // 2).astype(np.uint8)


def heat_over(pixels: Pixels, png: bytes) -> Pixels:
    """An image of any size, (H, W, 3) uint8 RGB, with a heatmap that was written as `palette_png` over it."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        heat = Image.fromarray(np.asarray(image)).resize(pixels.shape[1::-1], Image.Resampling.BILINEAR)
    return overlay(pixels, np.asarray(heat))


class WriteHeatmaps:
    """SCORED rows to OUTPUT rows, with a palette PNG for each image that has a score: a file, or bytes in its row.

    Args:
        output: of the run; its options say which images get which pictures, and where those go.
        preprocessing: that of each category's model.
        report: reports how long each batch took; None: nothing is reported.
    """

    def __init__(
        self, output: RunOutput, preprocessing: Mapping[str, Preprocessing], report: ProgressReporter | None = None
    ) -> None:
        self._output = output
        self._options = output.options
        self._preprocessing = dict(preprocessing)
        self._report = report

    def __call__(self, batch: pa.Table) -> pa.Table:
        began = time.process_time()
        rows = batch.select([name for name in SCORED.names if name not in _BINARY]).to_pylist()
        for name in ("heat", "pixels"):
            for row, value in zip(rows, batch[name], strict=True):
                row[name] = value.as_buffer()
        with ThreadPoolExecutor(_WRITERS) as pool:
            pictures = list(pool.map(self._pictures, rows))
        columns: dict[str, Any] = {name: batch[name] for name in OUTPUT.names if name in batch.schema.names}
        for name in _NO_PICTURES:
            columns[name] = [picture[name] for picture in pictures]
        result = with_passthrough(table(columns, OUTPUT), batch)
        computed = time.process_time() - began
        meters.count_stage_seconds("encode", computed)
        meters.count_images(
            (row["category"] if row["model_id"] else "", row["error_kind"], bool(row["is_anomalous"])) for row in rows
        )
        if self._report:
            self._report("encode", RunStatistics(encode_seconds=computed))
        return _with_folder_names(result) if self._options.partition_by == "category" else result

    def _pictures(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Of one row: the columns that name or hold its pictures."""
        made = self._drawn(row)
        if not made:
            return _NO_PICTURES
        if self._options.heatmaps_in == "parquet":
            return _NO_PICTURES | {f"{name}_png": data for name, data in made.items()}
        folder = f"{self._output.heatmap_path}/{storage.safe_name(row['category'], 'category')}"
        stem = f"{folder}/{row['image_id'] & (2**64 - 1):016x}"
        paths = {"heatmap": f"{stem}.png", "overlay": f"{stem}_overlay.png"}
        for name, data in made.items():
            # Waiting for the disk picture by picture costs more than drawing them: the pass waits once, at its end.
            storage.publish(storage.join(self._output.folder, paths[name]), data, durable=False)
        return _NO_PICTURES | {name: paths[name] for name in made}

    def _drawn(self, row: Mapping[str, Any]) -> dict[str, bytes]:
        heatmaps = self._options.heatmaps
        wanted = heatmaps == "all" or (heatmaps == "anomalous" and row["is_anomalous"])
        if not (wanted and row["heat"]):
            return {}
        preprocessing = self._preprocessing[row["category"]]
        size = row["width"], row["height"]
        content = preprocessing.content_shape(*size)
        levels = np.frombuffer(row["heat"], np.uint8).reshape(content)
        made = {"heatmap": palette_png(levels)}
        if self._options.overlay:
            left, top, right, bottom = preprocessing.content_box(*size)
            whole = np.frombuffer(row["pixels"], np.uint8).reshape(preprocessing.height, preprocessing.width, 3)
            blended = Image.fromarray(overlay(whole[top:bottom, left:right], levels))
            longest = _LONGEST_OVERLAY * max(preprocessing.height, preprocessing.width)
            made["overlay"] = _png(blended.resize(preprocessing.picture_size(*size, min(content), longest)))
        return made


def written_heatmap(out: str, row: Mapping[str, Any]) -> bytes:
    """The palette PNG of a row of OUTPUT, from its file or from the row; empty if there is none. Raises OSError."""
    if row["heatmap"]:
        return storage.read(storage.join(out, row["heatmap"]))
    return row["heatmap_png"] or b""


def _with_folder_names(rows: pa.Table) -> pa.Table:
    """Replace categories that no folder can be named as. No model has such a name, so these are rows with an error."""
    names = [_as_folder(name) for name in rows["category"].to_pylist()]
    return rows.set_column(rows.schema.get_field_index("category"), "category", pa.array(names, pa.string()))


def _as_folder(category: str) -> str:
    """What is written percent-encoded as the name of a folder: of at most 255 bytes, and none that is read as null."""
    if len(quote(category, safe="")) <= _LONGEST_FOLDER and category != storage.HIVE_NULL:
        return category
    return f"{category[:_KEPT_OF_FOLDER]}… {storage.digest(category.encode())[:12]}"


def _png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG", compress_level=_COMPRESSION)
    return sink.getvalue()
