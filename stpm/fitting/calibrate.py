"""Calibrate a model on images that it was not fitted on, with the same code that scoring uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress, repeat

import numpy as np
import numpy.typing as npt
import torch

from stpm.detector import Detector
from stpm.fitting.splits import Indices
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.method.anomaly_maps import Float32Array
from stpm.method.fusion import Distances, sample_distances
from stpm.method.memory_bank import MemoryBank
from stpm.method.scales import (
    DistanceScale,
    HeatmapScale,
    HeatmapScaleBuilder,
    fit_distance_scale,
    fit_scales,
    leave_one_out_scales,
)
from stpm.method.teacher import spatial_shape


def calibrate(
    detector: Detector,
    features: TeacherFeatures,
    parts: Iterable[tuple[Sequence[MemoryBank], Indices]],
    held_out: Indices,
) -> tuple[Float32Array, HeatmapScale, tuple[DistanceScale, ...], Float32Array]:
    """Measure scores, heatmap scale and distance scales on good images that a detector was not fitted on.

    Args:
        detector: the one to calibrate, not calibrated yet.
        features: of all images.
        parts: memory banks as the detector's, with the images that they do not hold: the detector's own and those that
            were held out, or those without each fold (cross-conformal prediction: Vovk, Cross-conformal predictors,
            2015). There are n images in all, one or more; two or more if the recipe fuses by quantiles.
        held_out: the images that the student was not trained on. Its distance maps of the others are brought to the
            quantiles of theirs: bench/RESULTS-quality.md compares that with a student of each fold's own.

    Returns:
        The (n,) scores of the images, by ascending index; the model's heatmap scale; the scales as in
        `Detector.distance_scales`; the (n,) largest pixels of the images' maps, as the scores.
    """
    compared = _compare(detector, features, parts)
    images = np.concatenate([each.images for each in compared])
    samples = [sample for each in compared for sample in each.samples]
    is_known = ~np.isin(images, held_out)
    corrections = []
    if is_known.any() and samples:
        corrections = _correct_student(samples, is_known, len(detector.recipe.levels) if detector.student else 0)
    heatmap_scale = HeatmapScaleBuilder(features.images.count_pixels(images))
    scales_of: Iterator[tuple[DistanceScale, ...]] = repeat(())
    if samples:
        scales_of = iter(leave_one_out_scales(samples, detector.map_weights))
    scores, max_pixels = [], []
    for each in compared:
        distances = (each.kept or each.compute()).to(detector.teacher.device)
        for i, image in enumerate(each.images):
            one = distances.select(slice(i, i + 1))
            if corrections and image not in held_out:
                one = Distances(
                    tuple(a * d + b for d, (a, b) in zip(one.student, corrections, strict=True)), one.memory
                )
            content = features.images.content[image : image + 1]
            (maps,) = detector.anomaly_maps(one, content, next(scales_of))
            ((max_pixel, _, score, *_),) = maps.scalars(detector.recipe.top_fraction).tolist()
            scores.append(score)
            max_pixels.append(max_pixel)
            heatmap_scale.add(maps.inspected_values())
    scales = fit_scales(samples, detector.map_weights) if samples else ()
    by_image, of_pixels = np.array([scores, max_pixels], np.float32)[:, np.argsort(images)]
    return by_image, heatmap_scale.build(), scales, of_pixels


@dataclass(frozen=True)
class _Compared:
    """A batch of images, their distance maps, if RAM holds them, and what computes these.

    Args:
        samples: values of the maps at the same positions, (K, P) for each image; none unless the recipe fuses by
            quantiles.
    """

    images: Indices
    kept: Distances | None
    compute: Callable[[], Distances]
    samples: Sequence[Float32Array]


def _compare(
    detector: Detector, features: TeacherFeatures, parts: Iterable[tuple[Sequence[MemoryBank], Indices]]
) -> list[_Compared]:
    """Compare images with the banks that do not hold them.

    An anomaly map needs scales from the other images, so compute all distance maps first. Those that RAM does not hold
    are computed again, to the same bits.
    """
    compared = []
    ram_left = features.ram_left
    for banks, part in parts:
        one = dataclasses.replace(detector, memory=tuple(bank.to(detector.teacher.device) for bank in banks))
        for batch in features.batches(part):
            compute = partial(_distances, one, features, batch)
            distances, samples = compute(), []
            ram_left -= distances.nbytes
            if detector.recipe.fusion == "quantile":
                content = features.images.content[batch]
                maps = detector.on_one_grid(distances, content)
                (mask,) = features.teacher.content_masks(content, [spatial_shape(maps)])
                samples = sample_distances(maps, mask, len(features.images))
            kept = distances.to(torch.device("cpu")) if ram_left >= 0 else None
            compared.append(_Compared(batch, kept, compute, samples))
    return compared


def _distances(detector: Detector, features: TeacherFeatures, batch: Indices) -> Distances:
    levels = [level.float() for level in features(batch)]
    return detector.distances(features.inputs(batch), features.images.content[batch], levels)


def _correct_student(
    samples: Sequence[Float32Array], is_known: npt.NDArray[np.bool_], levels: int
) -> list[tuple[float, float]]:
    """Bring a student's distances of images that it was trained on to the quantiles of the others.

    Changes the samples of its maps, the first of each image, and returns factor and summand of each map.
    """
    corrections = []
    for level in range(levels):
        known = [sample[level] for sample in compress(samples, is_known)]
        others = [sample[level] for sample in compress(samples, ~is_known)]
        factor, summand = fit_distance_scale(known).to(fit_distance_scale(others))
        corrections.append((factor, summand))
        for values in known:
            values[:] = factor * values + summand
    return corrections
