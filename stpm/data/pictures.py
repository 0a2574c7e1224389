"""Images as a person has them: paths, URIs, bytes, PIL images and arrays."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
from PIL import Image

from stpm import storage
from stpm.data import decoding, image_files
from stpm.data.decoding import Fetched
from stpm.errors import ImageError

# A path or URI, the bytes of an image file, a PIL image, or an array of uint8 or uint16: (H, W) or (H, W, 1) grey,
# (H, W, 3) RGB or (H, W, 4) RGBA.
Picture = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any]

# They have elements, which are no pictures.
_NO_PICTURES = bytearray | memoryview | io.IOBase
_KINDS = "give uint8 or uint16, (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA"


def is_one(given: Picture | Iterable[Picture]) -> TypeGuard[Picture]:
    """Return whether this is one picture, or what cannot be several: `fetch` says what is wrong with it."""
    if isinstance(given, np.ndarray):
        return given.ndim < 4
    return isinstance(given, str | os.PathLike | bytes | Image.Image | _NO_PICTURES) or not isinstance(given, Iterable)


def name_of(picture: Picture) -> str:
    """Return a picture's path or URI; "" if it was given as bytes or pixels."""
    return os.fspath(picture) if isinstance(picture, str | os.PathLike) else ""


def fetch(picture: Picture) -> Fetched:
    """Read the file of a picture, or make an image of an array.

    Raises:
        ImageError: if it cannot be read, is of another type, or is an array that is no image, or has no fixed range as
            one of float.
    """
    if isinstance(picture, str | os.PathLike):
        return image_files.read_uri(storage.absolute(os.fspath(picture)))
    if isinstance(picture, np.ndarray):
        return _from_array(picture)
    if isinstance(picture, bytes | Image.Image):
        return picture
    raise ImageError(
        "unsupported", f"{type(picture).__name__} is no image; give a path, a URI, bytes, a PIL image or an array"
    )


def _from_array(pixels: npt.NDArray[Any]) -> Image.Image:
    # Of either byte order.
    if pixels.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise ImageError("unsupported", f"an array of {pixels.dtype} has no fixed range; {_KINDS}")
    shape = pixels.shape[:2] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels.shape
    if not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))) or 0 in shape:
        raise ImageError("unsupported", f"an array of shape {pixels.shape} is no image; {_KINDS}")
    if shape[0] * shape[1] > decoding.MAX_PIXELS:
        raise ImageError("too_large", f"{shape[1]}×{shape[0]} pixels, at most {decoding.MAX_PIXELS:,} are allowed")
    pixels = np.ascontiguousarray(pixels.reshape(shape), pixels.dtype.newbyteorder("="))
    if pixels.dtype == np.uint16 and len(shape) == 3:
        # As Pillow reads files with 16 bits per colour.
        pixels = (pixels >> 8).astype(np.uint8)
    return Image.fromarray(pixels)
