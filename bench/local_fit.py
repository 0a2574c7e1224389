"""Fit in this process, without Ray: as a task that publishes a model, or keeping the parts of it to compare with."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from commands import CORES, make_parser, words
from metrics import read_mask
from sklearn.metrics import roc_auc_score

from stpm import storage
from stpm.cluster.device import assigned_device
from stpm.data import decoding, mvtec
from stpm.data.masks import resize_mask
from stpm.detector import Detector
from stpm.fitting.build_memory import MemoryCandidates
from stpm.fitting.calibrate import calibrate
from stpm.fitting.fit_category import WorkerSettings, fit_category
from stpm.fitting.splits import Indices, split_images
from stpm.fitting.task import FitTask
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.train_student import train_student
from stpm.fitting.training_images import load_images, preprocessing_for
from stpm.method import backbones
from stpm.method.anomaly_maps import Float32Array, cut_out
from stpm.method.arithmetic import choose_arithmetic
from stpm.method.backbones import StateDict
from stpm.method.device import device_capabilities
from stpm.method.fusion import Distances, sample_distances
from stpm.method.memory_bank import MemoryBank
from stpm.method.preprocessing import Content, Preprocessing
from stpm.method.recipe import Recipe
from stpm.method.scales import fit_scales
from stpm.method.teacher import Teacher
from stpm.method.teacher_weights import load_teacher_weights
from stpm.method.views import choose_views, levels_of_teacher
from stpm.metrics.category_metrics import AUPRO_LIMITS
from stpm.metrics.pixel_metrics import Mask, PixelCounts, count_pixels
from stpm.models.store import ModelStore
from stpm.options import WantedBackend

_BATCH = 16
_FOLDS = 5
_FALSE_ALARMS = 0.02
# Bytes that decoded images, and features, may take.
_RAM_BUDGET = 4 * 2**30


def make_fit_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options of benchmarks that fit by `fit`."""
    parser = make_parser(description)
    parser.add_argument("--data", required=True, help="data set in the MVTec AD layout")
    parser.add_argument("--categories", type=words, default="", help="separated by commas (default: all)")
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--teacher-weights", default="", help="file of weights, as for the fit job")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    return parser


def make_task(store: ModelStore, category: mvtec.Category, recipe: Recipe) -> FitTask:
    """Put the recipe's teacher into a store, and return the task that fits the category's model there."""
    digest = store.put_teacher(load_teacher_weights(recipe.teacher, recipe.teacher_weights, levels_of_teacher(recipe)))
    recipe = recipe.for_image_count(len(category.train))
    return FitTask(category.name, category.train, recipe, store.uri, digest)


def run_task(task: FitTask, backend: WantedBackend = "auto") -> None:
    """Fit and publish a model, on all cores.

    Raises:
        RuntimeError: if the fit fails.
    """
    torch.set_num_threads(CORES)
    device = assigned_device()
    arithmetic = choose_arithmetic([device_capabilities(device)], backend)
    settings = WorkerSettings(device, arithmetic, _RAM_BUDGET, _RAM_BUDGET, checkpoint_seconds=math.inf)
    if reason := fit_category(task, settings, lambda event: None).reason:
        raise RuntimeError(reason)


def change_recipe(base: Recipe, text: str) -> Recipe:
    """Return a recipe with `name=value` pairs replaced, values as JSON or plain words."""
    changes: dict[str, Any] = {}
    for pair in text.split():
        name, value = pair.split("=", 1)
        default = getattr(base, name)
        changes[name] = type(default)(value if isinstance(default, str) else json.loads(value))
    return dataclasses.replace(base, **changes)


def teacher_from(recipe: Recipe, preprocessing: Preprocessing) -> Teacher:
    """Return the recipe's teacher on this process's device, computed by PyTorch."""
    device = assigned_device()
    weights = load_teacher_weights(recipe.teacher, recipe.teacher_weights, levels_of_teacher(recipe))
    backbone = backbones.load_backbone(recipe.teacher, levels_of_teacher(recipe), weights, recipe.teacher)
    arithmetic = choose_arithmetic([device_capabilities(device)], "pytorch")
    precision = arithmetic.precision_to_fit(recipe.precision)
    return Teacher(backbone, preprocessing, device, precision, "pytorch", choose_views(recipe, preprocessing))


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A fitted detector that is not calibrated, the files of its held-out images, and the seconds of the fit."""

    detector: Detector
    student: StateDict | None
    held_out: list[bytes]
    seconds: float
    validation_loss: float | None


def fit(category: mvtec.Category, recipe: Recipe) -> Fitted:
    """Fit one model by PyTorch, in this process."""
    uris = [uri for uri, _ in category.train]
    preprocessing = preprocessing_for(recipe, uris)
    teacher = teacher_from(recipe, preprocessing)
    start = time.perf_counter()
    good = load_images(uris, preprocessing, _RAM_BUDGET)
    features = TeacherFeatures(teacher, good, _RAM_BUDGET, _RAM_BUDGET)
    train, held_out = split_images(np.arange(len(good)), recipe)
    memory = MemoryCandidates(features, train, recipe).banks
    trained = train_student(features, train, held_out, recipe, lambda epoch: None)
    seconds = time.perf_counter() - start
    held = [storage.read(uris[i]) for i in held_out]
    kept = trained.kept_epoch
    detector = Detector.assemble(teacher, recipe, trained.student, memory)
    return Fitted(detector, trained.student, held, seconds, None if kept is None else kept.validation_loss)


def folds_of(candidates: MemoryCandidates, shuffled: Indices) -> Iterator[tuple[Sequence[MemoryBank], Indices]]:
    """Yield the memory banks without each fold, with the images of the fold; images are in the order to split."""
    for fold in map(np.sort, np.array_split(shuffled, min(_FOLDS, len(shuffled)))):
        yield candidates.banks_without(fold), fold


def calibrate_on(
    detector: Detector,
    features: TeacherFeatures,
    parts: Iterable[tuple[Sequence[MemoryBank], Indices]],
    held_out: Indices,
) -> tuple[Detector, Float32Array]:
    """Return the detector with its distance scales, and the scores of the images that calibrate it, ascending."""
    scores, _, scales, _ = calibrate(detector, features, parts, held_out)
    return dataclasses.replace(detector, distance_scales=scales), np.sort(scores)


@torch.inference_mode()
def score_features(detector: Detector, features: TeacherFeatures, images: Indices) -> list[float]:
    """Score images by the teacher's features of them."""
    scores = []
    for batch in features.batches(images):
        content = features.images.content[batch]
        levels = [level.float() for level in features(batch)]
        maps = detector.anomaly_maps(detector.distances(features.inputs(batch), content, levels), content)
        scores += [score for part in maps for score in part.scalars(detector.recipe.top_fraction)[:, 2].tolist()]
    return scores


@dataclasses.dataclass(frozen=True)
class ComparedImages:
    """Distance maps of some images for each part of a model, with their content, labels and ground truth."""

    distances: Distances
    content: Content
    is_defect: Mask
    truth: list[Mask]


def compare(detector: Detector, files: Sequence[tuple[bytes, Mask | None]]) -> ComparedImages:
    """Compare image files (each with its mask at its own resolution, or None) with a model, as scoring does."""
    teacher = detector.teacher
    results, boxes, truth = [], [], []
    for start in range(0, len(files), _BATCH):
        decoded = [decoding.decode(data, teacher.preprocessing) for data, _ in files[start : start + _BATCH]]
        content = teacher.preprocessing.content((each.width, each.height) for each in decoded)
        inputs = teacher.inputs(torch.from_numpy(np.stack([each.pixels for each in decoded])))
        results.append(detector.distances(inputs, content))
        boxes.append(content.boxes)
    content = Content(np.concatenate(boxes))
    for (_, mask), (left, top, right, bottom) in zip(files, content.boxes.tolist(), strict=True):
        empty = np.zeros((bottom - top, right - left), bool)
        truth.append(empty if mask is None else resize_mask(mask, teacher.preprocessing))
    is_defect = np.array([mask.any() for mask in truth])
    return ComparedImages(concatenate(results), content, is_defect, truth)


def concatenate(batches: Sequence[Distances]) -> Distances:
    """Join batches in their order."""
    student = zip(*(batch.student for batch in batches), strict=True)
    memory = zip(*(batch.memory for batch in batches), strict=True)
    return Distances(tuple(map(torch.cat, student)), tuple(map(torch.cat, memory)))


def measure(compared: ComparedImages, normal: ComparedImages, detector: Detector, variant: str) -> list[float | None]:
    """Return METRICS, and the recall at 2 % false alarms, of a variant of a fit; `normal` gives the scales."""
    varied = change_recipe(detector.recipe, variant)
    changed = dataclasses.replace(
        detector,
        recipe=varied,
        student=detector.student if varied.student != "none" else None,
        memory=detector.memory if varied.memory else (),
    )
    normal_maps = changed.on_one_grid(_kept(normal.distances, changed), normal.content)
    scales = fit_scales(sample_distances(normal_maps), changed.map_weights)
    scores = []
    counts = PixelCounts.empty()
    distances = _kept(compared.distances, changed)
    for start in range(0, len(compared.truth), _BATCH):
        part = slice(start, start + _BATCH)
        maps = changed.anomaly_maps(distances.select(part), compared.content[part], scales)
        scores += [score for each in maps for score in each.scalars(varied.top_fraction)[:, 2].tolist()]
        cuts = [
            cut_out(total, box)
            for each in maps
            for total, box in zip(each.total.numpy(), each.content.boxes.tolist(), strict=True)
        ]
        counts += count_pixels(cuts, compared.truth[part])
    values: list[float | None] = [float(roc_auc_score(compared.is_defect, scores)), None, None]
    if any(mask.any() for mask in compared.truth):
        values[1:] = counts.rank_metrics()["auroc"], counts.aupro(AUPRO_LIMITS["pixel_aupro"])
    values.append(recall(np.array(scores), compared.is_defect))
    return [value and round(value, 4) for value in values]


def recall(scores: Float32Array, is_defect: Mask) -> float:
    """Return the share of defects above the cut that at most 2 % of the good test images exceed, in hindsight."""
    good = np.sort(scores[~is_defect])
    return float((scores[is_defect] > good[-1 - int(_FALSE_ALARMS * len(good))]).mean())


def _kept(distances: Distances, detector: Detector) -> Distances:
    """Return the distances of those parts that a detector has."""
    return Distances(distances.student if detector.student else (), distances.memory if detector.memory else ())


def compare_real(detector: Detector, category: mvtec.Category) -> ComparedImages:
    """Compare a category's test images with a model."""
    tests = [(storage.read(image.uri), read_mask(image.mask)) for image in category.test]
    is_defect = np.array([image.label != mvtec.GOOD for image in category.test])
    return dataclasses.replace(compare(detector, tests), is_defect=is_defect)
