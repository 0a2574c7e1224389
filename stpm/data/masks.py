"""Ground-truth masks of test images."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stpm.data import images
from stpm.data.image_files import read_uri
from stpm.data.mvtec import GOOD
from stpm.errors import DataError, ImageError


def read_mask(uri: str, label: str, mask: str, width: int, height: int) -> npt.NDArray[np.bool_]:
    """Read the mask of an image, (height, width); empty for a good image, or where there is none.

    Args:
        uri: URI of the image.
        label: "good" or a defect type.
        mask: URI of the mask; "": there is none.
        width: width of the image, pixels.
        height: height of the image, pixels.

    Raises:
        DataError: if the mask cannot be read, or is of another size than its image.
    """
    if label == GOOD or not mask:
        return np.zeros((height, width), bool)
    try:
        found = images.decode_mask(read_uri(mask))
    except ImageError as error:
        raise DataError(f"mask {mask} cannot be read: {error}; repair or remove it") from error
    if found.shape != (height, width):
        rows, columns = found.shape
        raise DataError(
            f"mask {mask} is {columns}×{rows}, its image {uri} {width}×{height}; give one of the image's size"
        )
    return found
