"""Third stage: from grey levels to PNG files. The scale was fixed with the model; nothing here looks at a range."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from stpm import storage
from stpm.images import Pixels
from stpm.scoring.progress import Done
from stpm.scoring.schema import OUTPUT, SCORED, table, with_carried

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


class WriteHeatmaps:
    """SCORED rows to OUTPUT rows, writing a palette PNG and an overlay for each image that has a score.

    Args:
        out: URI of the run folder.
        folder: under it, where the pictures go; their names are image ids.
        wanted: which images get pictures.
        report: told of each batch that is done; None tells nobody.
    """

    def __init__(self, out: str, folder: str, wanted: Heatmaps, report: Callable[[Done], None] | None = None) -> None:
        self._report = report
        self._out = out
        self._folder = folder
        self._wanted = wanted

    def __call__(self, batch: pa.Table) -> pa.Table:
        columns: dict[str, list[Any]] = {name: batch[name].to_pylist() for name in SCORED.names}
        with ThreadPoolExecutor(_WRITERS) as pool:
            names = list(
                pool.map(
                    self._write,
                    columns["image_id"],
                    columns["category"],
                    columns["pixels"],
                    columns["heat"],
                    columns["is_anomalous"],
                )
            )
        columns["heatmap"] = [name for name, _ in names]
        columns["overlay"] = [name for _, name in names]
        if self._report:
            errors = sum(map(bool, columns["error_kind"]))
            self._report(Done(batch.num_rows, errors, sum(map(bool, columns["is_anomalous"]))))
        return with_carried(table(columns, OUTPUT), batch)

    def _write(
        self, image_id: int, category: str, pixels: bytes, heat: bytes, is_anomalous: bool | None
    ) -> tuple[str, str]:
        wanted = self._wanted == "all" or (self._wanted == "anomalous" and is_anomalous)
        if not (wanted and heat):
            return "", ""
        size = int(len(heat) ** 0.5)
        levels = np.frombuffer(heat, np.uint8).reshape(size, size)
        rgb = np.frombuffer(pixels, np.uint8).reshape(size, size, 3)
        stem = f"{self._folder}/{storage.safe_name(category, 'category')}/{image_id & (2**64 - 1):016x}"
        plain, blended = f"{stem}.png", f"{stem}_overlay.png"
        storage.publish(storage.join(self._out, plain), palette_png(levels))
        storage.publish(storage.join(self._out, blended), _png(Image.fromarray(overlay(rgb, levels))))
        return plain, blended


def _png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG", compress_level=_COMPRESSION)
    return sink.getvalue()
