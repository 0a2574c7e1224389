"""Faults of a camera, made in its images."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter

from stpm import storage
from stpm.data import decoding


def open_image(uri: str) -> Image.Image:
    """Read an image file as RGB."""
    return Image.open(io.BytesIO(storage.read(uri)), formats=decoding.FORMATS).convert("RGB")


def brighten(image: Image.Image, factor: float) -> Image.Image:
    """Multiply all values by a factor, up to 255."""
    return image.point([min(round(value * factor), 255) for value in range(256)] * 3)


def blur(image: Image.Image, share: float) -> Image.Image:
    """Blur with a standard deviation that is a share of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(share * min(image.size)))


def move(image: Image.Image, right: float, down: float) -> Image.Image:
    """Move the image by shares of its sides, and fill the border with its reflection."""
    x, y = round(right * image.width), round(down * image.height)
    before, after = (max(y, 0), max(-y, 0)), (max(x, 0), max(-x, 0))
    padded = np.pad(np.asarray(image), (before, after, (0, 0)), mode="reflect")
    top, left = max(-y, 0), max(-x, 0)
    return Image.fromarray(padded[top : top + image.height, left : left + image.width])
