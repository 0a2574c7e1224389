"""Find what would make a model worse than its scores say, in a category's decoded images and their scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stpm.data.image_statistics import COMPARED
from stpm.fitting.training_images import TrainingImages
from stpm.method.preprocessing import Preprocessing

# Luma, 0 to 255. Values of 12 bits in a file of 16 become at most 15.
_ALMOST_BLACK = 16.0
# The largest image's scale over the smallest's.
_MIXED_SCALES = 2.0
# An image stands out if its score is this many times as far above the second as that is above the median. Of 20 scores
# with an exponential tail, the largest is in one of 1000 cases.
_FAR_ABOVE = 6.0
_MIN_SCORES = 10


def scale_range(images: TrainingImages, preprocessing: Preprocessing) -> tuple[float, float]:
    """Return the smallest and the largest scale at which a model sees images; 1 is their own size."""
    scales = [preprocessing.scale(*size) for size in {*images.sizes}]
    return min(scales), max(scales)


def find_image_problems(images: TrainingImages, preprocessing: Preprocessing) -> list[str]:
    """Describe what is wrong with the training images of a model with this preprocessing; none if nothing is."""
    problems = []
    brightness, contrast = (images.statistics[:, COMPARED.index(name)] for name in ("brightness", "contrast"))
    # The mean plus the standard deviation: a dark image may have bright parts.
    if (brightness + contrast * (brightness + 1)).max() < _ALMOST_BLACK:
        problems.append(
            f"all images are almost black (mean brightness at most {brightness.max():.0f} of 255); if these are values "
            "of 10 or 12 bits in files of 16, write them in the whole range"
        )
    copies = len(images) - len(np.unique(images.statistics, axis=0))
    if copies:
        problems.append(
            f"{copies} of {len(images)} images are copies of others; remove them: those that are held out score too "
            "low, and the threshold with them"
        )
    smallest, largest = scale_range(images, preprocessing)
    if largest > _MIXED_SCALES * smallest:
        problems.append(
            f"the images have different sizes or proportions: the model sees them at {smallest:.0%} to {largest:.0%} "
            "of their size; give each kind a category of its own"
        )
    return problems


def find_outlier(scores: npt.NDArray[np.float32], uris: Sequence[str]) -> str:
    """Name the image whose score is far above all others; "" if there is none, or there are fewer than ten.

    Args:
        scores: (n,) of the images that calibrate the model.
        uris: of these images.
    """
    if len(scores) < _MIN_SCORES:
        return ""
    largest = int(scores.argmax())
    second = float(np.sort(scores)[-2])
    if scores[largest] - second <= _FAR_ABOVE * (second - float(np.median(scores))):
        return ""
    return (
        f"look at {uris[largest]}: it scores {scores[largest]:.3g}, all other good images at most {second:.3g}; if it "
        "has a defect, remove it and fit again: it raises the threshold"
    )
