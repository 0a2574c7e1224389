from __future__ import annotations

from math import ceil, floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, label

from stpm.method.calibration import Calibration
from stpm.method.preprocessing import Resize
from stpm.method.regions import MAX_REGIONS, find_regions
from stpm.method.scales import HeatmapScale
from tests.conftest import make_preprocessing

SIDES, INPUTS = st.integers(1, 90), st.integers(1, 24)


def flood(above: np.ndarray) -> list[list[tuple[int, int]]]:
    """Return the (row, column) of the pixels of each 8-connected region."""
    left, found = set(zip(*(axis.tolist() for axis in np.nonzero(above)), strict=True)), []
    while left:
        queue = [min(left)]
        left.remove(queue[0])
        for y, x in queue:
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            queue += near
        found.append(queue)
    return found


@given(
    st.sampled_from(["stretch", "crop", "fit"]), INPUTS, INPUTS, SIDES, SIDES, st.floats(0, 1), st.integers(0, 2**32)
)
def test_regions_are_those_of_a_flood_fill(
    resize: Resize, rows: int, columns: int, width: int, height: int, density: float, seed: int
) -> None:
    """On maps of few values, parts of them not inspected, of images of any size and proportions."""
    rng, made = np.random.default_rng(seed), make_preprocessing(rows, columns, resize)
    shape = made.content_shape(width, height)
    anomaly_map = rng.integers(2, 4, shape).astype(np.float32) * (rng.random(shape) < density)
    anomaly_map[rng.random(shape) < rng.choice([0, 0.3])] = np.nan
    threshold = float(rng.choice([1, 2]))
    found, count, area = find_regions(anomaly_map, threshold, made, width, height)
    assert area == pytest.approx((anomaly_map > threshold).sum() / max((~np.isnan(anomaly_map)).sum(), 1))
    assert count == label(anomaly_map > threshold, np.ones((3, 3)))[1]
    left, top, right, bottom = made.source_box(width, height)
    across, down = (right - left) / shape[1], (bottom - top) / shape[0]
    expected = []
    for pixels in sorted(flood(anomaly_map > threshold), key=lambda each: (-len(each), min(each))):
        (y0, x0), (y1, x1) = np.min(pixels, 0).tolist(), np.max(pixels, 0).tolist()
        edges = left + x0 * across, top + y0 * down, left + (x1 + 1) * across, top + (y1 + 1) * down
        score = max(float(anomaly_map[each]) for each in pixels)
        peak_y, peak_x = min(each for each in pixels if anomaly_map[each] == score)
        expected.append(
            (
                *(floor(edge + 1e-6) for edge in edges[:2]),
                *(ceil(edge - 1e-6) for edge in edges[2:]),
                max(round(len(pixels) * across * down), 1),
                len(pixels) / int((~np.isnan(anomaly_map)).sum()),
                score,
                *made.to_original(peak_x, peak_y, width, height),
            )
        )
    assert list(map(tuple, found)) == expected[:MAX_REGIONS]
    assert all(
        0 <= r.left <= r.peak_x < r.right <= width and 0 <= r.top <= r.peak_y < r.bottom <= height for r in found
    )


@pytest.mark.parametrize(("rate", "expected"), [(0.02, 1), (0.1, 2), (0.35, 7)])
def test_of_good_images_the_region_rate_has_any_region(rate: float, expected: int) -> None:
    """Of 20 exchangeable images each is as likely to be the new one; 19 support no rate below 1/20."""
    rng, made = np.random.default_rng(7), make_preprocessing(12)
    maps = gaussian_filter(rng.standard_normal((20, 12, 12)), (0, 1.5, 1.5)).astype(np.float32)
    # Each is not inspected in a part of its own.
    maps[rng.random(maps.shape) < 0.1] = np.nan
    largest = np.nanmax(maps, axis=(1, 2))
    alarms = 0
    for i, new in enumerate(maps):
        calibration = Calibration(np.zeros(19, np.float32), HeatmapScale(0.0, 1.0), np.sort(np.delete(largest, i)))
        alarms += find_regions(new, calibration.pixel_threshold(rate), made, 50, 40)[1] > 0
    assert alarms == expected
