"""The region of interest: which pixels of an image are inspected. All others are as if they were not there."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stpm.errors import ConfigError

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Roi:
    """The inspected pixels of images of one size, at least one.

    Args:
        width: of the images, pixels.
        height: of the images, pixels.
        bits: the mask, row by row, eight pixels a byte (`numpy.packbits`), compressed by zlib, in base64.
    """

    width: int
    height: int
    bits: str

    @classmethod
    def of_mask(cls, mask: Mask) -> Roi:
        """Make one of a (height, width) bool mask, true at inspected pixels.

        Raises:
            ConfigError: if no pixel is inspected.
        """
        if mask.ndim != 2:
            raise ConfigError(f"the mask has the shape {mask.shape}; give one value for each pixel, (height, width)")
        if not mask.any():
            raise ConfigError("no pixel is inside; white pixels (above 0) are inspected, black ones ignored")
        height, width = mask.shape
        return cls(width, height, base64.b64encode(zlib.compress(np.packbits(mask).tobytes(), 9)).decode())

    @classmethod
    def of_polygons(cls, text: str, width: int, height: int) -> Roi:
        """Make one of what lies inside of polygons: `x,y x,y x,y; x,y …` in pixels of images of this size.

        Raises:
            ConfigError: if the text is no such list, or a point lies outside of the images.

        >>> Roi.of_polygons("1,1 2,1 2,2 1,2", width=4, height=3).mask.astype(int)
        array([[0, 0, 0, 0],
               [0, 1, 1, 0],
               [0, 1, 1, 0]])
        """
        from PIL import Image, ImageDraw

        drawn = Image.new("1", (width, height))
        for polygon in filter(None, map(str.strip, text.split(";"))):
            try:
                points = [(float(x), float(y)) for x, y in (point.split(",") for point in polygon.split())]
            except ValueError as error:
                raise ConfigError(f"{polygon!r} is no polygon; give pixels as in 10,10 200,10 200,180") from error
            if len(points) < 3:
                raise ConfigError(f"{polygon!r} has {len(points)} points; a polygon needs three or more")
            if outside := [f"{x:g},{y:g}" for x, y in points if not (0 <= x <= width and 0 <= y <= height)]:
                raise ConfigError(f"the point {outside[0]} is outside of the images, which are {width}×{height}")
            ImageDraw.Draw(drawn).polygon(points, fill=1)
        return cls.of_mask(np.asarray(drawn))

    @cached_property
    def box(self) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom of the inspected pixels, right and bottom exclusive."""
        rows, columns = (np.flatnonzero(self.mask.any(axis=axis)) for axis in (1, 0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1

    @property
    def box_size(self) -> tuple[int, int]:
        """Return width and height of the box."""
        left, top, right, bottom = self.box
        return right - left, bottom - top

    @cached_property
    def mask(self) -> Mask:
        """Return the (height, width) bool mask, true at inspected pixels."""
        packed = np.frombuffer(zlib.decompress(base64.b64decode(self.bits)), np.uint8)
        return np.unpackbits(packed, count=self.width * self.height).reshape(self.height, self.width).astype(bool)
