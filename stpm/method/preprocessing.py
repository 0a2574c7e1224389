"""How an image becomes the input of a network: geometry, and the normalisation of pixels.

A box is (left, top, right, bottom) in pixels, right and bottom exclusive, and an image size is (width, height), as in
Pillow. An array shape is (height, width), as in NumPy.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, exp, log, sqrt
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from stpm.method.recipe import MAX_SIDE, Resize
from stpm.method.roi import Mask, Roi

# Processes that decode images do not import torch.
if TYPE_CHECKING:
    from torch import Tensor

Interpolation = Literal["bilinear", "bicubic"]
PerChannel = tuple[float, float, float]
Boxes = npt.NDArray[np.int32]

# `fit` stretches an image whose aspect ratio is within this factor of the input's, instead of padding a few pixels.
_SAME_ASPECT = 1.1

# Of the sides of an input, unless the teacher divides it into patches.
SIDE_MULTIPLE = 32
_MIN_PIXELS = 65_536
# Of a forward pass on a CPU, and pixels of its images together.
MAX_CPU_BATCH = 16
_MAX_CPU_PIXELS = 8 * 2**20
# Of the sides of a coarse view: it has at most half of the pixels.
_MAX_SHRINK = sqrt(0.5)
# Width by height.
_MAX_ASPECT = 32.0


@dataclass(frozen=True)
class Content:
    """Where B images lie in the input, and which part of them is inspected.

    Args:
        boxes: (B, 4) int32 content boxes.
        inspected: of each image, the input's pixels that are inspected: (H, W) bool, row by row, eight pixels a byte
            (`numpy.packbits`); b"": the whole box. Empty: the whole box of each.
    """

    boxes: Boxes
    inspected: Sequence[bytes] = ()

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, chosen: slice | npt.NDArray[np.int64]) -> Content:
        """Select some of the images."""
        numbers = np.arange(len(self))[chosen]
        return Content(self.boxes[numbers], [self.inspected[i] for i in numbers] if self.inspected else ())

    def pixels(self, input_shape: tuple[int, int]) -> Mask | None:
        """Return the input's pixels that are inspected, (B, H, W) bool, or (1, H, W) if the same are of all images.

        None: all pixels of all images.
        """
        height, width = input_shape
        if (self.boxes == (0, 0, width, height)).all() and not any(self.inspected):
            return None
        parts = list(zip(map(tuple, self.boxes.tolist()), self.inspected or [b""] * len(self), strict=True))
        distinct = {part: _pixels(*part, input_shape) for part in parts}
        return np.stack([*distinct.values()] if len(distinct) == 1 else [distinct[part] for part in parts])


def _pixels(box: tuple[int, int, int, int], inspected: bytes, input_shape: tuple[int, int]) -> Mask:
    if inspected:
        return unpack(inspected, input_shape)
    left, top, right, bottom = box
    pixels = np.zeros(input_shape, bool)
    pixels[top:bottom, left:right] = True
    return pixels


def unpack(inspected: bytes, shape: tuple[int, int]) -> Mask:
    """Return the mask that `Content` has as bytes: (H, W) bool of this shape."""
    return np.unpackbits(np.frombuffer(inspected, np.uint8), count=shape[0] * shape[1]).reshape(shape).astype(bool)


class DataConfig(NamedTuple):
    """How a network's training images were prepared: mean and std per channel of pixels in [0, 1]; interpolation."""

    mean: PerChannel
    std: PerChannel
    interpolation: Interpolation


IMAGENET = DataConfig((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
UNSCALED = DataConfig((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear")


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of one model.

    Args:
        height: height of the input, pixels.
        width: width of the input, pixels.
        resize: see `Recipe.resize`.
        mean: mean per channel, of pixels in [0, 1].
        std: standard deviation per channel, of pixels in [0, 1].
        coarse_shape: height and width of the coarse view's input, pixels; None: there is one view.
        roi: the part of the images that is inspected; None: all of what the model sees.
    """

    height: int
    width: int
    resize: Resize
    interpolation: Interpolation
    mean: PerChannel
    std: PerChannel
    coarse_shape: tuple[int, int] | None = None
    roi: Roi | None = None

    @property
    def input_shape(self) -> tuple[int, int]:
        """Return height and width of the input, pixels."""
        return self.height, self.width

    @property
    def size_text(self) -> str:
        """Return height and width of each view's input: `704x672 and 192x192`."""
        shapes = [self.input_shape, *([self.coarse_shape] if self.coarse_shape else [])]
        return " and ".join(f"{height}x{width}" for height, width in shapes)

    @property
    def batch_size(self) -> int:
        """Return how many images a forward pass takes on a CPU, where more are no faster: fewer if they are large."""
        return max(min(MAX_CPU_BATCH, _MAX_CPU_PIXELS // (self.height * self.width)), 1)

    @property
    def padding_colour(self) -> tuple[int, int, int]:
        """Return the RGB colour of padding, 0 to 255: the mean, which becomes zero when normalised, up to rounding."""
        red, green, blue = (round(255 * value) for value in self.mean)
        return red, green, blue

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise images of any size: (B, H, W, 3) uint8 RGB to (B, 3, H, W) float32, channels last in memory."""
        import torch

        from stpm.method.device import constant

        mean, std = (constant(values, images.device).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return torch.addcmul(-mean / std, images.permute(0, 3, 1, 2).float(), 1 / (255 * std))

    def source_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return the part of an image of this size that the model sees, in the image's pixels.

        It is the box around the region of interest, or the whole image, which `crop` makes narrower or lower.
        """
        x, y, right, bottom = self.roi.box if self.roi else (0, 0, width, height)
        width, height = right - x, bottom - y
        if self.resize != "crop":
            return float(x), float(y), float(right), float(bottom)
        across = min(width, height * self.width / self.height)
        down = min(height, width * self.height / self.width)
        left, top = x + (width - across) / 2, y + (height - down) / 2
        return left, top, left + across, top + down

    def seen_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return the source box in whole pixels, at least one in each direction."""
        left, top, right, bottom = map(round, self.source_box(width, height))
        return left, top, max(right, left + 1), max(bottom, top + 1)

    def content_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return where the source box lies in the input: everywhere, unless `fit` pads. The box is never empty."""
        left, top, right, bottom = self.source_box(width, height)
        across, down = right - left, bottom - top
        distortion = (across / down) / (self.width / self.height)
        if self.resize != "fit" or 1 / _SAME_ASPECT <= distortion <= _SAME_ASPECT:
            return 0, 0, self.width, self.height
        scale = min(self.width / across, self.height / down)
        columns, rows = max(round(across * scale), 1), max(round(down * scale), 1)
        x, y = (self.width - columns) // 2, (self.height - rows) // 2
        return x, y, x + columns, y + rows

    def scale(self, width: int, height: int) -> float:
        """Return the input's pixels over an image's own, along the side that is shrunk more."""
        left, top, right, bottom = self.source_box(width, height)
        rows, columns = self.content_shape(width, height)
        return min(columns / (right - left), rows / (bottom - top))

    def content(self, sizes: Iterable[tuple[int, int]], inspected: Sequence[bytes] = ()) -> Content:
        """Return where images with these sizes (width, height) lie in the input; for `inspected` see `Content`."""
        return Content(np.array([self.content_box(*size) for size in sizes], np.int32).reshape(-1, 4), inspected)

    def content_shape(self, width: int, height: int) -> tuple[int, int]:
        """Return height and width of the content box: the shape of the image's anomaly map and heatmap."""
        left, top, right, bottom = self.content_box(width, height)
        return bottom - top, right - left

    def to_original(self, x: int, y: int, width: int, height: int) -> tuple[int, int]:
        """Map a pixel of an image's content box (column and row in it) to the image's own pixel under its centre."""
        left, top, right, bottom = self.source_box(width, height)
        rows, columns = self.content_shape(width, height)
        return int(left + (x + 0.5) * (right - left) / columns), int(top + (y + 0.5) * (bottom - top) / rows)

    def picture_size(self, width: int, height: int, shorter: int, longest: int) -> tuple[int, int]:
        """Return width and height of a picture that shows people what the model sees, in the image's proportions.

        Its shorter side has the length `shorter`, or less where the longer side would exceed `longest`.
        """
        left, top, right, bottom = self.source_box(width, height)
        sides = right - left, bottom - top
        scale = min(shorter / min(sides), longest / max(sides))
        return max(round(sides[0] * scale), 1), max(round(sides[1] * scale), 1)


def choose_input_shape(sizes: Sequence[tuple[int, int]], budget: int, multiple: int = SIDE_MULTIPLE) -> tuple[int, int]:
    """Choose the input's height and width for images of these sizes (width, height).

    The input has the images' median aspect ratio (between 1:32 and 32:1) and about as many pixels as the median image,
    at least 65,536 and at most the budget, which is at least 1024. Height and width are multiples of `multiple`, from
    it to 4096.
    """
    median_aspect = exp(statistics.median(log(width / height) for width, height in sizes))
    aspect = min(max(median_aspect, 1 / _MAX_ASPECT), _MAX_ASPECT)
    max_pixels = min(budget, MAX_SIDE**2 * min(aspect, 1 / aspect))
    pixels = min(max(statistics.median(width * height for width, height in sizes), _MIN_PIXELS), max_pixels)
    height = _nearest_multiple(sqrt(pixels / aspect), multiple)
    width = _nearest_multiple(sqrt(pixels * aspect), multiple)
    while height * width > budget or max(height, width) > MAX_SIDE:
        smaller = [(height - multiple, width), (height, width - multiple)]
        height, width = min((s for s in smaller if min(s) > 0), key=lambda s: abs(log(s[1] / s[0] / aspect)))
    if not 1 / _SAME_ASPECT <= width / height / median_aspect <= _SAME_ASPECT:
        # The images are padded: drop whole steps of padding.
        content = min(height, width / median_aspect)
        height = min(height, ceil(content / multiple) * multiple)
        width = min(width, ceil(content * median_aspect / multiple) * multiple)
    return height, width


def choose_coarse_shape(
    input_shape: tuple[int, int], pixels: int, multiple: int = SIDE_MULTIPLE
) -> tuple[int, int] | None:
    """Return height and width of a coarse view, of about this many pixels in the input's proportions.

    None if the input itself has less than twice as many, where it sees a part as a whole, too, or is too narrow.

    >>> choose_coarse_shape((576, 832), 36_864)
    (160, 224)
    """
    height, width = input_shape
    shrink = sqrt(pixels / (height * width))
    coarse = _nearest_multiple(height * shrink, multiple), _nearest_multiple(width * shrink, multiple)
    return coarse if max(coarse[0] / height, coarse[1] / width) <= _MAX_SHRINK else None


def _nearest_multiple(side: float, multiple: int) -> int:
    return max(round(side / multiple), 1) * multiple
