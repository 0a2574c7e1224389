"""Third stage: from grey levels to PNG files. The scale was fixed with the model; nothing here looks at a range."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from stpm import storage
from stpm.images import Pixels, View
from stpm.scoring.progress import Done
from stpm.scoring.schema import OUTPUT, SCORED, with_carried

Heatmaps = Literal["all", "anomalous", "none"]

_WRITERS = 8
_OPACITY = 0.5
# Of zlib: one tenth of the time of the default, for files a fifth larger.
_COMPRESSION = 1


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
    blended = (1 - _OPACITY) * pixels + _OPACITY * _PALETTE[heat]
    return np.round(blended).astype(np.uint8)


def heat_over(pixels: Pixels, png: bytes) -> Pixels:
    """An image of any size, (H, W, 3) uint8 RGB, with a heatmap that was written as `palette_png` over it."""
    with Image.open(io.BytesIO(png)) as image:
        heat = Image.fromarray(np.asarray(image)).resize(pixels.shape[1::-1], Image.Resampling.BILINEAR)
    return overlay(pixels, np.asarray(heat))


class WriteHeatmaps:
    """SCORED rows to OUTPUT rows, writing a palette PNG for each image that has a score.

    Args:
        out: URI of the run folder.
        folder: under it, where the pictures go; their names are image ids.
        wanted: which images get pictures.
        overlays: the views of the categories whose images get an overlay too, in their own proportions.
        report: told of each batch that is done; None tells nobody.
    """

    def __init__(
        self,
        out: str,
        folder: str,
        wanted: Heatmaps,
        overlays: Mapping[str, View] | None = None,
        report: Callable[[Done], None] | None = None,
    ) -> None:
        self._report = report
        self._out = out
        self._folder = folder
        self._wanted = wanted
        self._overlays = dict(overlays or {})

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.select([name for name in SCORED.names if name != "anomaly_map"]).to_pylist()
        with ThreadPoolExecutor(_WRITERS) as pool:
            names = list(pool.map(self._write, rows))
        columns: dict[str, Any] = {name: batch[name] for name in OUTPUT.names if name in batch.schema.names}
        columns["heatmap"] = pa.array([name for name, _ in names], pa.string())
        columns["overlay"] = pa.array([name for _, name in names], pa.string())
        if self._report:
            errors = sum(bool(row["error_kind"]) for row in rows)
            self._report(Done(batch.num_rows, errors, sum(bool(row["is_anomalous"]) for row in rows)))
        return with_carried(pa.table([columns[name] for name in OUTPUT.names], schema=OUTPUT), batch)

    def _write(self, row: Mapping[str, Any]) -> tuple[str, str]:
        wanted = self._wanted == "all" or (self._wanted == "anomalous" and row["is_anomalous"])
        if not (wanted and row["heat"]):
            return "", ""
        size = int(len(row["heat"]) ** 0.5)
        levels = np.frombuffer(row["heat"], np.uint8).reshape(size, size)
        category = storage.safe_name(row["category"], "category")
        stem = f"{self._folder}/{category}/{row['image_id'] & (2**64 - 1):016x}"
        storage.publish(storage.join(self._out, f"{stem}.png"), palette_png(levels))
        if category not in self._overlays:
            return f"{stem}.png", ""
        rgb = np.frombuffer(row["pixels"], np.uint8).reshape(size, size, 3)
        blended = Image.fromarray(overlay(rgb, levels))
        proportions = self._overlays[category].proportions(row["width"], row["height"])
        storage.publish(storage.join(self._out, f"{stem}_overlay.png"), _png(blended.resize(proportions)))
        return f"{stem}.png", f"{stem}_overlay.png"


def _png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG", compress_level=_COMPRESSION)
    return sink.getvalue()
