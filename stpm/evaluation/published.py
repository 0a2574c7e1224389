"""What others report of STPM on MVTec AD, and whether a run's figures may be compared with it.

Image AUROC, pixel AUROC and AUPRO (up to a false positive rate of 0.3) per category from the repository of the paper's
authors (gdwang08/STFPM); their means over the fifteen categories are .9555, .9702 and .9283.
"""

from __future__ import annotations

from typing import NamedTuple

from stpm.evaluation.options import MasksAt
from stpm.preprocessing import IMAGENET, Preprocessing
from stpm.recipe import PRESETS
from stpm.record import ModelRecord


class Published(NamedTuple):
    """Figures of one category, and how many test images its test set has."""

    image_auroc: float
    pixel_auroc: float
    pixel_aupro: float
    test_images: int


METRICS = ("image_auroc", "pixel_auroc", "pixel_aupro")

MVTEC_AD = {
    "carpet": Published(0.964, 0.990, 0.966, 117),
    "grid": Published(0.982, 0.990, 0.964, 78),
    "leather": Published(0.951, 0.991, 0.957, 124),
    "tile": Published(0.982, 0.969, 0.897, 117),
    "wood": Published(0.996, 0.965, 0.901, 79),
    "bottle": Published(1.0, 0.988, 0.959, 83),
    "cable": Published(0.936, 0.958, 0.895, 150),
    "capsule": Published(0.893, 0.986, 0.896, 132),
    "hazelnut": Published(1.0, 0.985, 0.952, 110),
    "metal_nut": Published(0.983, 0.972, 0.948, 115),
    "pill": Published(0.951, 0.976, 0.966, 167),
    "screw": Published(0.895, 0.988, 0.949, 160),
    "toothbrush": Published(0.897, 0.990, 0.927, 42),
    "transistor": Published(0.939, 0.819, 0.881, 100),
    "zipper": Published(0.961, 0.988, 0.869, 151),
}

# What the published protocol fixes. How long and by which optimiser a student learns is no part of it.
_RECIPE = PRESETS["paper"]
_RECIPE_FIELDS = ("teacher", "teacher_weights", "levels")
_PREPROCESSING = Preprocessing(256, 256, "stretch", IMAGENET.interpolation, IMAGENET.mean, IMAGENET.std)
_PREPROCESSING_FIELDS = ("size", "resize", "interpolation", "mean", "std")


def difference_of_protocol(category: str, test_images: int, model: ModelRecord, masks_at: MasksAt) -> str:
    """Why a category's figures and the published ones do not mean the same, or "" if they do.

    Raises:
        KeyError: if nothing is published of it.
    """
    differences = [
        f"{name.replace('_', ' ')} {getattr(ours, name)} instead of {getattr(theirs, name) or 'none'}"
        for ours, theirs, names in (
            (model.recipe, _RECIPE, _RECIPE_FIELDS),
            (model.preprocessing, _PREPROCESSING, _PREPROCESSING_FIELDS),
        )
        for name in names
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if masks_at != "model":
        differences.append("masks at original size instead of model size")
    if test_images != MVTEC_AD[category].test_images:
        differences.append(f"{test_images} test images instead of {MVTEC_AD[category].test_images}")
    return "; ".join(differences)
