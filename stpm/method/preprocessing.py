"""From an image to a network's input: size, resizing, interpolation and normalisation. Numbers only: no pixels here.

Boxes are (left, top, right, bottom), right and bottom exclusive, in pixels; an image's size is (width, height), as
Pillow has them. Shapes of arrays are (height, width), as NumPy has them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Resize = Literal["stretch", "crop", "fit"]
Interpolation = Literal["bilinear", "bicubic"]
PerChannel = tuple[float, float, float]
Boxes = npt.NDArray[np.int32]

# `fit` stretches an image whose aspect ratio is within this factor of the input's, instead of padding a few pixels.
_SAME_ASPECT = 1.1

LARGEST_SIDE = 4096
_SIDE_MULTIPLE = 32
_LEAST_PIXELS = 65_536
_LARGEST_ASPECT = 8.0


class DataConfig(NamedTuple):
    """What a network was trained on: mean and deviation per channel of pixels from 0 to 1, and the interpolation."""

    mean: PerChannel
    std: PerChannel
    interpolation: Interpolation


IMAGENET = DataConfig((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
UNSCALED = DataConfig((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear")


@dataclass(frozen=True)
class Preprocessing:
    """All that turns an image into the input of one model.

    Args:
        height: of the input, pixels.
        width: of the input, pixels.
        resize: `stretch` scales the whole image to the whole input; `crop` the largest central part that has the
            input's proportions; `fit` scales the whole image as far as it fits, and pads around it, unless its aspect
            ratio is within 10 % of the input's: then it is stretched.
        interpolation: of resizing.
        mean: per channel, of pixels from 0 to 1.
        std: per channel, of pixels from 0 to 1.
    """

    height: int
    width: int
    resize: Resize
    interpolation: Interpolation
    mean: PerChannel
    std: PerChannel

    @property
    def size(self) -> str:
        """The input's size in words: height x width."""
        return f"{self.height}x{self.width}"

    @property
    def padding_colour(self) -> tuple[int, int, int]:
        """RGB from 0 to 255 of what `fit` adds: the mean, which normalisation turns into zero (but for rounding)."""
        red, green, blue = (round(255 * value) for value in self.mean)
        return red, green, blue

    def source_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The part of an image of this size that the model sees, in the image's pixels."""
        if self.resize != "crop":
            return 0.0, 0.0, float(width), float(height)
        across = min(width, height * self.width / self.height)
        down = min(height, width * self.height / self.width)
        left, top = (width - across) / 2, (height - down) / 2
        return left, top, left + across, top + down

    def content_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Where that part lies in the input: all of it, unless `fit` pads. Never empty."""
        distortion = (width / height) / (self.width / self.height)
        if self.resize != "fit" or 1 / _SAME_ASPECT <= distortion <= _SAME_ASPECT:
            return 0, 0, self.width, self.height
        scale = min(self.width / width, self.height / height)
        across, down = max(round(width * scale), 1), max(round(height * scale), 1)
        left, top = (self.width - across) // 2, (self.height - down) // 2
        return left, top, left + across, top + down

    def content_boxes(self, sizes: Iterable[tuple[int, int]]) -> Boxes:
        """The content boxes of some images of these sizes (width, height): (N, 4) int32."""
        return np.array([self.content_box(*size) for size in sizes], np.int32).reshape(-1, 4)

    def content_shape(self, width: int, height: int) -> tuple[int, int]:
        """Height and width of the content box: the shape of an image's anomaly map and heatmap."""
        left, top, right, bottom = self.content_box(width, height)
        return bottom - top, right - left

    def to_original(self, x: int, y: int, width: int, height: int) -> tuple[int, int]:
        """The pixel of an image of this size that lies under the centre of a pixel of its content box.

        Args:
            x: column, counted from the left of the content box.
            y: row, counted from its top.
            width: of the image.
            height: of the image.

        Returns:
            Column and row.
        """
        left, top, right, bottom = self.source_box(width, height)
        rows, columns = self.content_shape(width, height)
        return int(left + (x + 0.5) * (right - left) / columns), int(top + (y + 0.5) * (bottom - top) / rows)

    def picture_size(self, width: int, height: int, shorter: int, longest: int) -> tuple[int, int]:
        """Width and height of a picture of what the model sees, in its own proportions.

        Args:
            width: of the image.
            height: of the image.
            shorter: what the shorter side is to be, unless the longer one would be above `longest`.
            longest: the most that the longer side may be.
        """
        left, top, right, bottom = self.source_box(width, height)
        sides = right - left, bottom - top
        scale = min(shorter / min(sides), longest / max(sides))
        return max(round(sides[0] * scale), 1), max(round(sides[1] * scale), 1)


def choose_size(sizes: Sequence[tuple[int, int]], budget: int) -> tuple[int, int]:
    """The input's height and width for images of these sizes (width, height).

    They have the images' median aspect ratio (within 1:8) and about as many pixels as the median image, at least
    65,536, at most the budget. Both are multiples of 32, from 32 to 4096.

    Args:
        sizes: at least one.
        budget: the most pixels that the input may have, at least 1024.
    """
    aspect = exp(statistics.median(log(width / height) for width, height in sizes))
    aspect = min(max(aspect, 1 / _LARGEST_ASPECT), _LARGEST_ASPECT)
    most = min(budget, LARGEST_SIDE**2 * min(aspect, 1 / aspect))
    pixels = min(max(statistics.median(width * height for width, height in sizes), _LEAST_PIXELS), most)
    height, width = _nearest_multiple(sqrt(pixels / aspect)), _nearest_multiple(sqrt(pixels * aspect))
    while height * width > budget:
        smaller = [(height - _SIDE_MULTIPLE, width), (height, width - _SIDE_MULTIPLE)]
        height, width = min((s for s in smaller if min(s) > 0), key=lambda s: abs(log(s[1] / s[0] / aspect)))
    return height, width


def _nearest_multiple(side: float) -> int:
    return max(round(side / _SIDE_MULTIPLE), 1) * _SIDE_MULTIPLE
