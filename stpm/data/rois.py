"""Read regions of interest: of a mask's file, white where an image is inspected, or of polygons."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from stpm import storage
from stpm.data import decoding, pictures
from stpm.data.image_files import read_uri
from stpm.data.pictures import Picture
from stpm.errors import ConfigError, DataError, ImageError
from stpm.method.roi import Roi

# So much of the brightest level is white, too.
_WHITE = 0.9
_POLYGONS = re.compile(r"[-\d.,;\s]+")


def read_roi(uri: str) -> Roi:
    """Read the region of interest of one image.

    Raises:
        ImageError: if its mask cannot be read, is black, or has no black where it is darkest.
    """
    try:
        return Roi.of_mask(_inside(np.asarray(decoding.open_grey(read_uri(uri)))))
    except (ImageError, ConfigError) as error:
        kind = error.kind if isinstance(error, ImageError) else "unsupported"
        raise ImageError(kind, f"its region of interest {uri}: {error}") from error


def _inside(levels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Find the white pixels of a mask: it may be of zeros and ones, or a JPEG, whose black is not all 0."""
    darkest, brightest = levels.min(), levels.max()
    # A picture in colours, of which no part would be outside.
    if 0.5 < darkest / max(brightest, 1) < _WHITE:
        raise ImageError("unsupported", f"it has levels from {darkest} to {brightest}; save it in black and white")
    inside: npt.NDArray[np.bool_] = levels > brightest / 2
    return inside


def parse_roi(text: str, image: Picture) -> Roi:
    """Return what an option names: a mask's path or URI; or polygons, in pixels of images of the size of this image.

    Raises:
        DataError: if it is neither, or cannot be read.
    """
    try:
        if _POLYGONS.fullmatch(text):
            return Roi.of_polygons(text, *decoding.read_size(pictures.fetch(image)))
        return read_roi(storage.absolute(text))
    except (ConfigError, ImageError) as error:
        raise DataError(f"the region of interest {text!r}: {error}") from error
