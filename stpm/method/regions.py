"""Regions of an image: connected pixels of its anomaly map above a threshold of their own.

An image has one if its largest pixel is above the threshold. A smallest size, calibrated likewise (a square of 4, 8 or
16 pixels), finds more defects of one product and fewer of another.
"""

from __future__ import annotations

from math import ceil, floor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.ndimage import find_objects, label

from stpm.method.preprocessing import Preprocessing

# Regions of an image that are listed: its largest.
MAX_REGIONS = 20
# Pixels that share a side or a corner are connected.
_NEIGHBOURS = np.ones((3, 3), bool)
# Of a pixel: what rounding may add to a side of a box.
_EPS = 1e-6


class Region(NamedTuple):
    """A region, in pixels of the image itself.

    Args:
        left: of the smallest box that holds it; right and bottom are exclusive. The box is never empty.
        area: pixels, at least 1.
        share: of the part of the image that is inspected, in (0, 1].
        score: the largest value of the anomaly map in it.
        peak_x: column of that value; peak_y is its row.
    """

    left: int
    top: int
    right: int
    bottom: int
    area: int
    share: float
    score: float
    peak_x: int
    peak_y: int


def find_regions(
    anomaly_map: npt.NDArray[np.float32], threshold: float, preprocessing: Preprocessing, width: int, height: int
) -> tuple[tuple[Region, ...], int, float]:
    """Find the pixels above a threshold in the map of an image of this size; NaN, not inspected, is in no region.

    Returns:
        Its MAX_REGIONS largest regions, the largest first, and of equal ones the upper; how many there are in all; the
        fraction of the inspected pixels that is in them.
    """
    above = anomaly_map > np.float32(threshold)
    if not above.any():
        return (), 0, 0.0
    # Label no more than the box of all regions: an image has few of them.
    rows, columns = (np.flatnonzero(above.any(axis)) for axis in (1, 0))
    x, y = int(columns[0]), int(rows[0])
    part = np.s_[y : rows[-1] + 1, x : columns[-1] + 1]
    labels, count = label(above[part], _NEIGHBOURS)
    sizes, boxes = np.bincount(labels.ravel())[1:], find_objects(labels)
    inspected = np.count_nonzero(~np.isnan(anomaly_map))
    left, top, right, bottom = preprocessing.source_box(width, height)
    across, down = (right - left) / anomaly_map.shape[1], (bottom - top) / anomaly_map.shape[0]
    found = []
    for index in np.argsort(-sizes, kind="stable")[:MAX_REGIONS].tolist():
        down_slice, across_slice = boxes[index]
        inside = np.where(labels[boxes[index]] == index + 1, anomaly_map[part][boxes[index]], -np.inf)
        peak_y, peak_x = divmod(int(inside.argmax()), inside.shape[1])
        start_x, start_y = x + across_slice.start, y + down_slice.start
        size = int(sizes[index])
        found.append(
            Region(
                floor(left + start_x * across + _EPS),
                floor(top + start_y * down + _EPS),
                ceil(left + (x + across_slice.stop) * across - _EPS),
                ceil(top + (y + down_slice.stop) * down - _EPS),
                max(round(size * across * down), 1),
                float(size / inspected),
                float(inside[peak_y, peak_x]),
                *preprocessing.to_original(start_x + peak_x, start_y + peak_y, width, height),
            )
        )
    return tuple(found), count, float(sizes.sum() / inspected)
