"""Ground-truth masks of test images: true where a file's value is above 0."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from stpm.data.decoding import open_grey
from stpm.data.image_files import read_uri
from stpm.data.mvtec import GOOD
from stpm.errors import DataError, ImageError
from stpm.method.preprocessing import Preprocessing

Mask = npt.NDArray[np.bool_]


def decode_mask(data: bytes) -> Mask:
    """Decode the file of a mask at its own size, (height, width). Raises ImageError."""
    return np.asarray(open_grey(data)) > 0


def read_mask(uri: str, label: str, mask: str, width: int, height: int) -> Mask:
    """Read the mask of an image, (height, width); empty for a good image, or where there is none.

    Args:
        uri: of the image, which has this width and height in pixels.
        label: "good" or a defect type.
        mask: URI of the mask; "": there is none.

    Raises:
        DataError: if the mask cannot be read, or is of another size than its image.
    """
    if label == GOOD or not mask:
        return np.zeros((height, width), bool)
    try:
        found = decode_mask(read_uri(mask))
    except ImageError as error:
        raise DataError(f"mask {mask} cannot be read: {error}; repair or remove it") from error
    if found.shape != (height, width):
        rows, columns = found.shape
        raise DataError(
            f"mask {mask} is {columns}×{rows}, its image {uri} {width}×{height}; give one of the image's size"
        )
    return found


def resize_mask(mask: Mask, preprocessing: Preprocessing) -> Mask:
    """Cut out the part of a mask that the model sees, and resize it to the anomaly map by nearest neighbour."""
    image = Image.fromarray(mask.astype(np.uint8))
    height, width = preprocessing.content_shape(*image.size)
    box = preprocessing.source_box(*image.size)
    return np.asarray(image.resize((width, height), Image.Resampling.NEAREST, box=box)) > 0


def crop_mask(mask: Mask, preprocessing: Preprocessing) -> Mask:
    """Cut out the part of a mask that the model sees, at the mask's own resolution."""
    left, top, right, bottom = preprocessing.seen_box(mask.shape[1], mask.shape[0])
    return mask[top:bottom, left:right]
