"""A category's training images: how they become the network's input, and all of them decoded."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from stpm import storage
from stpm.data import images
from stpm.data.images import Pixels
from stpm.errors import DataError, ImageError, join_first
from stpm.method.backbones import data_config
from stpm.method.preprocessing import IMAGENET, UNSCALED, Boxes, DataConfig, Preprocessing, choose_size
from stpm.method.recipe import Recipe

_READERS = 8
_SIZES_READ = 32


@dataclass(frozen=True)
class TrainingImages:
    """Decoded images: `pixels` (N, H, W, 3) uint8 RGB, in memory or in a file; `content` (N, 4) int32 content boxes."""

    pixels: Pixels
    content: Boxes

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def on_disk(self) -> bool:
        return isinstance(self.pixels, np.memmap)


def normalisation_of(recipe: Recipe) -> DataConfig:
    """Mean, deviation and interpolation that a recipe asks for.

    Raises:
        ConfigError: if they are to be the teacher's, and timm does not know them.
    """
    if recipe.normalisation == "teacher":
        return data_config(recipe.teacher)
    return IMAGENET if recipe.normalisation == "imagenet" else UNSCALED


def preprocessing_for(recipe: Recipe, uris: Sequence[str]) -> Preprocessing:
    """What a recipe comes to for these training images. Where their sizes matter, the headers of some are read.

    Raises:
        ConfigError: if timm does not know the teacher's normalisation.
        DataError: if the size is `auto` and none of those headers can be read.
    """
    config = normalisation_of(recipe)
    height, width = recipe.size.sides or choose_size(_some_sizes(uris), recipe.pixels)
    return Preprocessing(height, width, recipe.resize, config.interpolation, config.mean, config.std)


def _some_sizes(uris: Sequence[str]) -> list[tuple[int, int]]:
    """Width and height of up to 32 images, evenly spaced."""
    chosen = np.unique(np.linspace(0, len(uris) - 1, min(_SIZES_READ, len(uris))).round().astype(int))
    sizes: list[tuple[int, int]] = []
    problems: list[str] = []

    def read(uri: str) -> None:
        try:
            sizes.append(images.read_size(storage.read_at_most(uri, images.MAX_BYTES)))
        except (ImageError, DataError, OSError) as error:
            problems.append(f"{uri}: {error}")

    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(read, [uris[i] for i in chosen]))
    if not sizes:
        raise _unreadable(problems, len(chosen))
    return sizes


def load_images(uris: Sequence[str], preprocessing: Preprocessing, budget: int) -> TrainingImages:
    """Decode images: in memory if their pixels fit a budget of bytes, else in a file.

    Raises:
        DataError: naming the files that cannot be read. A student is not fitted on what is left, since a set that
            lost images silently is not the set that its owner chose.
    """
    shape = (len(uris), preprocessing.height, preprocessing.width, 3)
    pixels = np.empty(shape, np.uint8) if math.prod(shape) <= budget else _file_backed(shape)
    content = np.empty((len(uris), 4), np.int32)
    problems: list[str] = []

    def load(index: int) -> None:
        try:
            decoded = images.decode(storage.read_at_most(uris[index], images.MAX_BYTES), preprocessing)
        except (ImageError, DataError, OSError) as error:
            problems.append(f"{uris[index]}: {error}")
        else:
            pixels[index] = decoded.pixels
            content[index] = preprocessing.content_box(decoded.width, decoded.height)

    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(load, range(len(uris))))
    if problems:
        raise _unreadable(problems, len(uris))
    return TrainingImages(pixels, content)


def _unreadable(problems: list[str], tried: int) -> DataError:
    shown = join_first(sorted(problems))
    return DataError(f"{len(problems)} of {tried} training images cannot be read: {shown}; repair or remove them")


def _file_backed(shape: tuple[int, ...]) -> Pixels:
    # The file has no name, so that it is gone with the process, however that ends.
    with tempfile.TemporaryFile() as file:
        try:
            # A file with holes would be accepted, and kill the process at the first page that the disk has no room for.
            os.posix_fallocate(file.fileno(), 0, math.prod(shape))
        except OSError as error:
            raise DataError(
                f"no room for {math.prod(shape) / 2**30:.2f} GiB of decoded images in {tempfile.gettempdir()} "
                f"({error.strerror}); free some, set TMPDIR to a larger disk, or raise --memory-gib"
            ) from error
        return np.memmap(file, np.uint8, "r+", shape=shape)
