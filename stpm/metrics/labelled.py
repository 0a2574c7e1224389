"""One category's labelled scores, and the counts of its pixels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from itertools import groupby
from operator import add, attrgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stpm.data.masks import crop_mask, resize_mask
from stpm.data.mvtec import GOOD
from stpm.errors import DataError, UndefinedMetricError
from stpm.method.preprocessing import Preprocessing
from stpm.metrics.intervals import Flags, Scores
from stpm.metrics.pixel_metrics import Map, Mask, PixelCounts, count_pixels


@dataclass(frozen=True)
class LabelledScores:
    """The N scored images of one category that have a label: "good" or a defect type.

    Args:
        scores: larger is more anomalous.
        threshold: of the model; NaN without images.
        pixels: pixel counts by label.
        no_pixels: why there are no pixel counts, or "".
        error_count: number of images with a label that could not be scored.
        unlabelled_count: number of images without a label.
        vanished_masks: URIs of masks whose defects are too small for the anomaly map: no pixel metric counts them.
        problems: one line each.
    """

    labels: npt.NDArray[np.str_]
    scores: Scores
    is_anomalous: Flags
    threshold: float
    pixels: Mapping[str, PixelCounts]
    no_pixels: str
    error_count: int
    unlabelled_count: int
    vanished_masks: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def is_defect(self) -> Flags:
        """True for a defect, (N,)."""
        return np.asarray(self.labels != GOOD)

    @property
    def defect_types(self) -> list[str]:
        """The labels of defects, sorted."""
        return sorted({*self.labels.tolist()} - {GOOD})

    def pixel_counts(self) -> PixelCounts:
        """Add up the counts over all labels. Raise UndefinedMetricError if there are none."""
        if self.no_pixels:
            raise UndefinedMetricError(self.no_pixels)
        return reduce(add, self.pixels.values(), PixelCounts.empty())

    def of_defect(self, defect_type: str) -> LabelledScores:
        """Select one defect type and all good images."""
        chosen = np.isin(self.labels, (GOOD, defect_type))
        return replace(
            self,
            labels=self.labels[chosen],
            scores=self.scores[chosen],
            is_anomalous=self.is_anomalous[chosen],
            pixels={label: counts for label, counts in self.pixels.items() if label in (GOOD, defect_type)},
        )


class MaskedMap(NamedTuple):
    """The anomaly map and the mask of an image, (H, W) both; the mask's URI if its defect is too small for the map."""

    label: str
    anomaly_map: Map
    mask: Mask
    vanished_mask: str = ""

    @classmethod
    def at_model_size(
        cls, label: str, anomaly_map: Map, mask: Mask, mask_uri: str, preprocessing: Preprocessing
    ) -> MaskedMap:
        """Bring the mask of an image to the map's size by nearest neighbour, as the paper's authors do."""
        resized = resize_mask(mask, preprocessing)
        is_vanished = crop_mask(mask, preprocessing).any() and not resized.any()
        return cls(label, anomaly_map, resized, mask_uri if is_vanished else "")


class LabelledPixels:
    """Counts the pixels of labelled images, a batch after the other, so that few maps are in memory.

    `counts` has the pixel counts by label, and `vanished` the URIs of masks whose defects are too small for the map.
    """

    def __init__(self) -> None:
        self.counts: dict[str, PixelCounts] = {}
        self.vanished: list[str] = []

    def add(self, batch: Iterable[MaskedMap]) -> None:
        """Count the pixels of some images. Raise UndefinedMetricError if a value of a map is not finite."""
        images = sorted(batch, key=attrgetter("label"))
        self.vanished += [image.vanished_mask for image in images if image.vanished_mask]
        for label, some in groupby(images, attrgetter("label")):
            _, maps, masks, _ = zip(*some, strict=True)
            self.counts[label] = self.counts.get(label, PixelCounts.empty()) + count_pixels(maps, masks)


def require_masks(masks: Mapping[str, str]) -> None:
    """Raise UndefinedMetricError if no defect has a mask, and DataError if only some have one.

    `masks` has the URI of the mask of each defective image, or "", by that of the image.
    """
    unmasked = [uri for uri, mask in masks.items() if not mask]
    if len(unmasked) == len(masks):
        raise UndefinedMetricError("no masks")
    if unmasked:
        raise DataError(
            f"{len(unmasked)} of {len(masks)} defects have no mask, {unmasked[0]} among them; add or remove masks"
        )
