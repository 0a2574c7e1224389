"""A category's training images: their preprocessing, all of them decoded, and what is wrong with them."""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stpm import storage
from stpm.data import decoding, pictures
from stpm.data.decoding import Fetched, Pixels
from stpm.data.image_statistics import COMPARED
from stpm.data.pictures import Picture
from stpm.data.rois import read_roi
from stpm.errors import ConfigError, DataError, ImageError, join_first
from stpm.method.backbones import describe_levels, resolve_data_config
from stpm.method.preprocessing import (
    IMAGENET,
    SIDE_MULTIPLE,
    UNSCALED,
    Content,
    DataConfig,
    Preprocessing,
    choose_coarse_shape,
    choose_input_shape,
    unpack,
)
from stpm.method.recipe import Recipe
from stpm.method.roi import Roi

_READERS = 8
_MAX_HEADERS_READ = 32
# Errors of the file itself, such as a broken link.
_LASTING = (FileNotFoundError, PermissionError)
# Luma, 0 to 255. Values of 12 bits in a file of 16 become at most 15.
_ALMOST_BLACK = 16.0
# Brightness or sharpness, as a fraction of the median, below which an image is dark or blurred.
_LOW = 0.5
# The largest image's scale over the smallest's.
_MIXED_SCALES = 2.0


@dataclass(frozen=True)
class TrainingImages:
    """Decoded images, N of them.

    Args:
        pixels: (N, H, W, 3) uint8 RGB, in memory or in a file.
        content: where they lie in the pixels, and which part of them is inspected.
        statistics: (N, len(COMPARED)) float32 of the images' own pixels, in the order of COMPARED.
        modes: Pillow's name of the kind of pixels of each image's file.
        names: of each image.
        preprocessing: with which they were decoded.
    """

    pixels: Pixels
    content: Content
    statistics: npt.NDArray[np.float32]
    modes: tuple[str, ...]
    names: tuple[str, ...]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def statistics_table(self) -> pa.Table:
        """The statistics, with a name for each column."""
        return pa.table(dict(zip(COMPARED, self.statistics.T, strict=True)))

    @property
    def on_disk(self) -> bool:
        return isinstance(self.pixels, np.memmap)

    def count_pixels(self, images: npt.NDArray[np.int64]) -> int:
        """Count the inspected pixels of some images, at model size."""
        left, top, right, bottom = self.content.boxes[images].astype(np.int64).T
        counts = (right - left) * (bottom - top)
        for i, image in enumerate(images if self.content.inspected else ()):
            if inspected := self.content.inspected[image]:
                counts[i] = unpack(inspected, self.preprocessing.input_shape).sum()
        return int(counts.sum())

    def scale_range(self) -> tuple[float, float]:
        """Return the smallest and the largest scale at which a model sees the images; 1 is their own size."""
        scales = [
            self.preprocessing.scale(*size) for size in np.unique(self.statistics[:, :2].astype(int), axis=0).tolist()
        ]
        return min(scales), max(scales)

    def find_problems(self) -> list[str]:
        """Describe what would make a model of these images worse than its scores say; [] if nothing would."""
        problems = []
        brightness, contrast, sharpness = (
            self.statistics[:, COMPARED.index(name)] for name in ("brightness", "contrast", "sharpness")
        )
        # The mean plus the standard deviation: a dark image may have bright parts.
        if (brightness + contrast * (brightness + 1)).max() < _ALMOST_BLACK:
            problems.append(
                f"all images are almost black (mean brightness at most {brightness.max():.0f} of 255); if these are "
                "values of 10 or 12 bits in files of 16, write them in the whole range"
            )
        distinct, first = np.unique(self.statistics, axis=0, return_index=True)
        if len(distinct) < len(self):
            problems.append(
                f"{self._count(np.isin(np.arange(len(self)), first, invert=True))} copies of others; remove them: "
                "the threshold counts each as a good image of its own"
            )
        for low, what in ((brightness, "dark"), (sharpness, "blurred")):
            if (is_low := low < _LOW * np.median(low)).any():
                problems.append(
                    f"{self._count(is_low)} {what} beside the others; leave them out, unless good images may be so"
                )
        mode, *others = Counter(self.modes).most_common()
        if others:
            problems.append(
                f"{self._count(np.array(self.modes) != mode[0])} of another kind of pixels "
                f"({', '.join(kind for kind, _ in others)}; most are {mode[0]}); save all alike"
            )
        smallest, largest = self.scale_range()
        if largest > _MIXED_SCALES * smallest:
            problems.append(
                f"the images have different sizes or proportions: the model sees them at {smallest:.0%} to "
                f"{largest:.0%} of their size; give each kind a category of its own"
            )
        return problems

    def _count(self, chosen: npt.NDArray[np.bool_]) -> str:
        """Say how many images are chosen, and which."""
        named = join_first([self.names[i] for i in np.flatnonzero(chosen)], 3, ", ")
        return f"{chosen.sum()} of {len(self)} images ({named}) are"


def choose_normalisation(recipe: Recipe) -> DataConfig:
    """Return the mean, standard deviation and interpolation of a recipe.

    Raises:
        ConfigError: if the recipe takes the teacher's, and timm does not know the teacher.
    """
    if recipe.normalisation == "teacher":
        return resolve_data_config(recipe.teacher)
    return IMAGENET if recipe.normalisation == "imagenet" else UNSCALED


def preprocessing_for(recipe: Recipe, training: Sequence[Picture], roi: Roi | None = None) -> Preprocessing:
    """Return a recipe's preprocessing of these training images, of which a region of interest may be all that counts.

    For the size `auto` without a region, read the headers of some.

    Raises:
        ConfigError: if the teacher is unknown, or cannot take the size.
        DataError: if the size is `auto` and none of the headers can be read.
    """
    config = choose_normalisation(recipe)
    multiple = describe_levels(recipe.teacher, tuple(recipe.levels)).side_multiple
    shape = recipe.size.sides
    if not shape:
        sizes = [roi.box_size] if roi else _read_some_sizes(training)
        shape = choose_input_shape(sizes, recipe.pixels, multiple)
    if multiple != SIDE_MULTIPLE and any(side % multiple for side in shape):
        raise ConfigError(f"--size is {recipe.size}; {recipe.teacher} needs multiples of {multiple} pixels, or auto")
    coarse = choose_coarse_shape(shape, recipe.coarse_pixels, multiple) if recipe.max_views > 1 else None
    return Preprocessing(*shape, recipe.resize, config.interpolation, config.mean, config.std, coarse, roi)


def _read_some_sizes(training: Sequence[Picture]) -> list[tuple[int, int]]:
    """Read width and height of up to 32 images, evenly spaced in the list."""
    chosen = np.unique(np.linspace(0, len(training) - 1, min(_MAX_HEADERS_READ, len(training))).round().astype(int))
    sizes: list[tuple[int, int]] = []
    errors = _read_all([training[i] for i in chosen], lambda _, fetched: sizes.append(decoding.read_size(fetched)))
    if not sizes:
        raise _unreadable(errors, len(chosen))
    return sizes


def load_images(
    training: Sequence[Picture], preprocessing: Preprocessing, budget: int, rois: Mapping[str, str] | None = None
) -> TrainingImages:
    """Decode images: into memory if their pixels fit a budget of bytes, else into a file.

    `rois` are the URIs of masks, by those of the images that have a region of interest of their own.

    Raises:
        DataError: if files cannot be read. To fit on the others would hide that images are missing.
    """
    shape = (len(training), *preprocessing.input_shape, 3)
    pixels = np.empty(shape, np.uint8) if math.prod(shape) <= budget else _allocate_in_file(shape)
    boxes = np.empty((len(training), 4), np.int32)
    inspected = [b""] * len(training)
    statistics = np.empty((len(training), len(COMPARED)), np.float32)
    modes = [""] * len(training)
    one_large_image = Lock()

    def decode(index: int, fetched: Fetched) -> None:
        own = rois.get(pictures.name_of(training[index])) if rois else None
        roi = read_roi(own) if own else None
        is_large = math.prod(decoding.read_size(fetched)) > decoding.MAX_PIXELS // (_READERS // 2)
        with one_large_image if is_large else nullcontext():
            decoded = decoding.decode(fetched, preprocessing, roi)
        pixels[index] = decoded.pixels
        boxes[index] = preprocessing.content_box(decoded.width, decoded.height)
        inspected[index] = decoded.inspected
        statistics[index] = decoded.width, decoded.height, *decoded.statistics
        modes[index] = decoded.mode

    if errors := _read_all(training, decode):
        raise _unreadable(errors, len(training))
    names = [pictures.name_of(picture) or f"image {i}" for i, picture in enumerate(training)]
    content = Content(boxes, inspected)
    return TrainingImages(pixels, content, statistics, tuple(modes), tuple(names), preprocessing)


def _read_all(training: Sequence[Picture], use: Callable[[int, Fetched], None]) -> dict[str, Exception]:
    """Fetch images in parallel, and call `use` with the index and the file of each. Return the errors, by name."""
    errors: dict[str, Exception] = {}

    def read(index: int) -> None:
        picture = training[index]
        try:
            if isinstance(picture, str):
                use(index, storage.read_at_most(picture, decoding.MAX_BYTES))
            else:
                use(index, pictures.fetch(picture))
        except (ImageError, DataError, OSError) as error:
            errors[pictures.name_of(picture) or f"image {index}"] = error

    storage.in_parallel(read, range(len(training)), _READERS)
    return errors


def _unreadable(errors: Mapping[str, Exception], tried: int) -> DataError:
    shown = join_first([f"{uri}: {errors[uri]}" for uri in sorted(errors)])
    if any(isinstance(error, ImageError) and error.kind == "out_of_memory" for error in errors.values()):
        advice = "give fewer --workers, or a machine with more memory"
    elif any(isinstance(error, OSError) and not isinstance(error, _LASTING) for error in errors.values()):
        advice = "run the same command again when storage can be read"
    else:
        advice = "repair or remove them"
    return DataError(f"{len(errors)} of {tried} training images cannot be read: {shown}; {advice}")


def _allocate_in_file(shape: tuple[int, ...]) -> Pixels:
    size = math.prod(shape)
    # The file has no name: the system removes it when the process ends, even if it is killed.
    with tempfile.TemporaryFile() as file:
        try:
            # Reserve the space now: to write to a sparse file on a full disk kills the process (SIGBUS).
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise DataError(
                f"no room for {size / 2**30:.2f} GiB of decoded images in {tempfile.gettempdir()} "
                f"({error.strerror}); free some, set TMPDIR to a larger disk, or raise --worker-ram-gib"
            ) from error
        return np.memmap(file, np.uint8, "r+", shape=shape)
