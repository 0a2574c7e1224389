"""Cheap statistics of one decoded image, which show a change of camera, lamp or lens.

They come from a fixed grid of samples and a few rows and columns: their cost hardly grows with the image.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

Values = npt.NDArray[np.float32]

# Samples per side, and per side of a cell of the thumbnail: enough to average out a sensor's noise.
_SAMPLES = 256
_CELL = 4
# Rows, and columns, in which sharpness is measured; and the pixels between which the coarse difference is taken.
_LINES = 32
_COARSE = 8
_EQUAL_WEIGHTS = np.full((_SAMPLES // _CELL) ** 2, (_CELL / _SAMPLES) ** 2, np.float32)
# ITU-R BT.601, as Pillow's mode "L".
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


class ImageStatistics(NamedTuple):
    """Statistics of one image.

    Args:
        brightness: mean luma, 0 to 255.
        contrast: standard deviation of the luma over its mean (RMS contrast), from 0.
        sharpness: energy of differences over one pixel as a share of that over eight pixels. 1/64 where brightness
            varies as slowly as a ramp, 1/8 at perfect edges, 1 in noise; a brighter lamp does not change it.
        red_to_green: mean of the red channel over that of the green channel.
        blue_to_green: mean of the blue channel over that of the green channel.
        position_x: centre of the content, from 0 (left) to 1 (right): of the squared difference of the luma from the
            median luma of the image's border.
        position_y: the same from top to bottom.
    """

    brightness: float
    contrast: float
    sharpness: float
    red_to_green: float
    blue_to_green: float
    position_x: float
    position_y: float


NAMES = ImageStatistics._fields
# The columns that are compared between a night and the images that a model was fitted on.
COMPARED = ("width", "height", *NAMES)


def compute_statistics(image: Image.Image) -> ImageStatistics:
    """Compute the statistics of an RGB image, whatever its size."""
    sampled = image.resize((_SAMPLES, _SAMPLES), Image.Resampling.NEAREST).reduce(_CELL)
    pixels = np.asarray(sampled, np.float32)
    luma = pixels @ _LUMA
    # The mean of each channel, by a product, which is ten times as fast. Adding 1 gives black images a colour too.
    red, green, blue = (_EQUAL_WEIGHTS @ pixels.reshape(-1, 3) + 1).tolist()
    brightness = float(luma.mean())
    x, y = _content_centre(luma)
    contrast = float(luma.std()) / (brightness + 1)
    return ImageStatistics(brightness, contrast, _sharpness(image), red / green, blue / green, x, y)


def _content_centre(luma: Values) -> tuple[float, float]:
    """Return column and row of the content's centre, each 0 to 1; the middle if the image has no content."""
    border = np.concatenate([luma[0], luma[-1], luma[1:-1, 0], luma[1:-1, -1]])
    content = (luma - np.median(border)) ** 2
    total = float(content.sum())
    if not total:
        return 0.5, 0.5
    place = (np.arange(len(luma), dtype=np.float32) + 0.5) / len(luma)
    return float(content.sum(0) @ place) / total, float(content.sum(1) @ place) / total


def _sharpness(image: Image.Image) -> float:
    # Take whole rows and columns, which keep the image's resolution. Most sensors resolve green best.
    rows = image.resize((image.width, min(_LINES, image.height)), Image.Resampling.NEAREST).getchannel("G")
    columns = image.resize((min(_LINES, image.width), image.height), Image.Resampling.NEAREST).getchannel("G")
    fine = coarse = 0.0
    for lines in (np.asarray(rows, np.float32), np.asarray(columns, np.float32).T.copy()):
        fine += _energy(lines[:, 1:] - lines[:, :-1])
        coarse += _energy(lines[:, _COARSE:] - lines[:, :-_COARSE])
    return fine / coarse if coarse else 1.0


def _energy(differences: Values) -> float:
    """Return the mean square, 0 if there are no values."""
    flat = differences.ravel()
    return float(flat @ flat) / len(flat) if len(flat) else 0.0
