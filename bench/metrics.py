"""Metrics of test images from scores and anomaly maps, of our models and of anomalib's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score

from stpm import storage
from stpm.data import mvtec
from stpm.data.masks import decode_mask, resize_mask
from stpm.method.preprocessing import Preprocessing
from stpm.metrics.category_metrics import AUPRO_LIMITS
from stpm.metrics.pixel_metrics import Map, Mask, PixelCounts, count_pixels

_MAPS_AT_ONCE = 16


class MapMetrics(NamedTuple):
    """Metrics of test images, in [0, 1]; those of pixels are None without masks."""

    image_auroc: float
    pixel_auroc: float | None
    pixel_aupro: float | None


METRICS = MapMetrics._fields


def read_mask(uri: str) -> Mask | None:
    """Return a test image's ground truth at its own resolution, or None if there is no URI."""
    return decode_mask(storage.read(uri)) if uri else None


def map_metrics(
    tests: Sequence[mvtec.TestImage], scores: Sequence[float], maps: Sequence[Map], preprocessing: Preprocessing
) -> MapMetrics:
    """Return the metrics of test images from their scores and anomaly maps.

    Bring masks to the maps' size by nearest neighbour, as our evaluation does.
    """
    image_auroc = float(roc_auc_score([test.label != mvtec.GOOD for test in tests], scores))
    if not any(test.mask for test in tests):
        return MapMetrics(image_auroc, None, None)
    counts = PixelCounts.empty()
    for start in range(0, len(maps), _MAPS_AT_ONCE):
        batch = maps[start : start + _MAPS_AT_ONCE]
        masks = []
        for test, each in zip(tests[start : start + _MAPS_AT_ONCE], batch, strict=True):
            mask = read_mask(test.mask)
            masks.append(np.zeros(each.shape, bool) if mask is None else resize_mask(mask, preprocessing))
        counts += count_pixels(batch, masks)
    aupro = counts.aupro(AUPRO_LIMITS["pixel_aupro"])
    return MapMetrics(image_auroc, counts.rank_metrics()["auroc"], aupro)
