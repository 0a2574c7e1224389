"""What a detector says about one image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from stpm.data import decoding, pictures
from stpm.data.decoding import Pixels
from stpm.data.heatmaps import coloured, overlay, resize_map
from stpm.data.image_statistics import ImageStatistics
from stpm.data.pictures import Picture
from stpm.errors import ImageError
from stpm.method.regions import Region
from stpm.method.scales import HeatmapScale
from stpm.options import Heatmaps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAN = float("nan")


class Request(NamedTuple):
    """What decides about images, and what their results hold besides numbers.

    Args:
        false_alarm_rate: see `Detector.score`, also for `region_rate`.
        heatmaps: images whose results have `heatmap_levels`.
        maps: whether all results have the `model_map`, and not those with regions alone.
    """

    false_alarm_rate: float = 0.01
    region_rate: float = 0.1
    heatmaps: Heatmaps = "none"
    maps: bool = True


@dataclass(frozen=True, eq=False)
class Result:
    """One image's result.

    Args:
        score: mean of the anomaly map's highest values; larger is more anomalous. NaN with an error.
        fine_score, coarse_score: the mean of each view's own map at the pixels that make the score: which view has seen
            the defect. None if the model has no such view, or its map is a product of levels.
        p_value: conformal p-value against held-out good images, in (0, 1]. NaN with an error.
        is_anomalous: score > threshold.
        threshold: score above which an image is called anomalous. NaN with an error.
        peak: column and row of the anomaly map's maximum, pixels of the image itself.
        peak_features: (64,) float32, what an anomaly looks like, see `stpm.method.peak_features`; None if the image is
            not anomalous, or the model has no memory.
        pixel_threshold: value of the map above which pixels make regions. NaN with an error.
        area: fraction of the inspected pixels that are in regions, 0 to 1.
        region_count: how many there are; `regions` are the largest, `stpm.method.regions.MAX_REGIONS` at most.
        size: width and height of the image itself, pixels.
        seen: left, top, right and bottom of the part of the image that the model sees, pixels of the image itself.
        model_map: (h, w) float32, the anomaly map of that part at model size, as the jobs store it.
        heatmap_levels: (h, w) uint8, the grey levels of `model_map`; empty unless they were asked for.
        picture: the image as it was given.
        error: why the image could not be scored; None if it was.
    """

    score: float = _NAN
    fine_score: float | None = None
    coarse_score: float | None = None
    p_value: float = _NAN
    is_anomalous: bool = False
    threshold: float = _NAN
    peak: tuple[int, int] = (-1, -1)
    peak_features: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    pixel_threshold: float = _NAN
    area: float = _NAN
    region_count: int = 0
    regions: tuple[Region, ...] = field(default=(), repr=False)
    size: tuple[int, int] = (0, 0)
    seen: tuple[int, int, int, int] = field(default=(0, 0, 0, 0), repr=False)
    model_map: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32), repr=False)
    heatmap_levels: Pixels = field(default_factory=lambda: np.zeros((0, 0), np.uint8), repr=False)
    heatmap_scale: HeatmapScale = field(default_factory=lambda: HeatmapScale(0.0, 1.0), repr=False)
    seed: int = 0
    model_id: str = ""
    statistics: ImageStatistics | None = field(default=None, repr=False)
    picture: Picture | None = field(default=None, repr=False)
    error: ImageError | None = None

    @property
    def name(self) -> str:
        """Return the path or URI of the image; "" if it was given as pixels."""
        return "" if self.picture is None else pictures.name_of(self.picture)

    @property
    def anomaly_map(self) -> npt.NDArray[np.float32]:
        """Return the anomaly map in the image's own pixels: (height, width) float32, NaN where the model sees nothing.

        Raises:
            ImageError: if the image could not be scored.
        """
        if self.error:
            raise self.error
        width, height = self.size
        left, top, right, bottom = self.seen
        whole = np.full((height, width), np.nan, np.float32)
        whole[top:bottom, left:right] = resize_map(self.model_map, bottom - top, right - left)
        return whole

    def plot(self) -> npt.NDArray[np.object_]:
        """Draw the picture, its heatmap and both together, on the model's fixed scale.

        Returns:
            Three axes of matplotlib.

        Raises:
            ImageError: if the image could not be scored, or cannot be read again.
        """
        import matplotlib.pyplot as plt

        heatmap, picture = self.heatmap(), self.pixels()
        figure, axes = plt.subplots(1, 3, figsize=(12, 12 / 3 * picture.shape[0] / picture.shape[1] + 0.6))
        drawn = (picture, coloured(heatmap), overlay(picture, heatmap))
        verdict = "anomalous" if self.is_anomalous else "good"
        titles = (self.name.rsplit("/", 1)[-1], f"score {self.score:.3g}, p = {self.p_value:.3g}", verdict)
        each: Axes
        for each, pixels, title in zip(axes, drawn, titles, strict=True):
            each.imshow(pixels)
            each.set_title(title)
            each.axis("off")
        figure.tight_layout()
        return np.asarray(axes)

    def pixels(self) -> Pixels:
        """Return the picture itself, (height, width, 3) uint8 RGB. A file is read again.

        Raises:
            ImageError: if it cannot be read.
        """
        if self.picture is None:
            raise ImageError("missing", "the result has no picture")
        return np.asarray(decoding.open_rgb(pictures.fetch(self.picture)))

    def heatmap(self) -> Pixels:
        """Return the heatmap's grey levels in the image's own pixels, (height, width) uint8, 0 where nothing is seen.

        Raises:
            ImageError: if the image could not be scored.
        """
        return self.heatmap_scale.apply(np.nan_to_num(self.anomaly_map, nan=self.heatmap_scale.low))
