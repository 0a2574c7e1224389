"""Fit and calibrate one detector on decoded images. No Ray, no storage."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from stpm.detector import Detector
from stpm.fitting.build_memory import build_memory
from stpm.fitting.calibrate import calibrate_detector, cross_validate_scores
from stpm.fitting.image_problems import find_image_problems, find_outlier
from stpm.fitting.splits import Indices, split_images
from stpm.fitting.task import Epoch, FitWarning
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.train_student import Checkpoints, train_student
from stpm.method.calibration import Calibration
from stpm.method.memory_bank import MemoryBank
from stpm.method.recipe import Recipe
from stpm.models.record import FitRecord, ModelRecord
from stpm.models.store import describe_files, encode_model

Reporter = Callable[[Epoch | str], None]


@dataclass(frozen=True)
class FittedModel:
    """A fitted detector, and all that a store keeps of it: the contents of its files, by name."""

    detector: Detector
    record: ModelRecord
    files: dict[str, bytes]


def fit_detector(
    features: TeacherFeatures,
    recipe: Recipe,
    images: Sequence[str],
    report: Reporter,
    *,
    started: float,
    distance_budget: int,
    category: str = "",
    teacher_digest: str = "",
    checkpoints: Sequence[Checkpoints | None] = (),
) -> FittedModel:
    """Train the student, build the memory, and calibrate.

    Args:
        features: the good images, and the teacher.
        recipe: how to fit, with the epochs that `Recipe.for_image_count` gives it.
        images: name of each image, for messages.
        report: called with each finished epoch, and with messages for the log.
        started: when the fit began, `time.perf_counter()`.
        distance_budget: bytes of RAM for cached distance maps.
        category: name of the model's category.
        teacher_digest: digest of the teacher's weights.
        checkpoints: one for the student, then one for the student of each calibration fold; empty: save none.

    Raises:
        ConfigError: if a level has a single position.
        DataError: if there are too few images.
        DivergedError: if a loss is not finite.
    """
    teacher = features.teacher
    train, held_out = split_images(len(features.images), recipe)
    for problem in find_image_problems(features.images, teacher.preprocessing):
        report(FitWarning(problem))
    folds = recipe.fold_count(len(features.images))
    saved = [*checkpoints] or [None] * (1 + folds)
    memory = _build_memory(features, train, recipe, report)
    trained = train_student(features, train, held_out, recipe, report, saved[0])
    detector = Detector.assemble(teacher, recipe, trained.student, memory)
    scores, heatmap_scale, distance_scales = calibrate_detector(detector, features, held_out, distance_budget)
    calibrating = held_out
    if folds:
        report(f"fitting {folds} more models, to calibrate on every image")
        scores = cross_validate_scores(features, recipe, saved[1:], distance_budget)
        calibrating = np.arange(len(scores))
    if outlier := find_outlier(scores, [images[i] for i in calibrating]):
        report(FitWarning(outlier))
    kept = trained.kept_epoch
    history = pa.Table.from_pylist([dataclasses.asdict(epoch) for epoch in trained.history])
    files = encode_model(
        trained.student,
        memory,
        pa.table({"score": scores, "is_added": np.zeros(len(scores), bool)}),
        features.images.statistics_table,
        history,
    )
    record = ModelRecord(
        category=category,
        recipe=recipe,
        preprocessing=teacher.preprocessing,
        precision=teacher.precision,
        teacher_digest=teacher_digest,
        heatmap_scale=heatmap_scale,
        distance_scales=distance_scales,
        fit=FitRecord(
            seconds=time.perf_counter() - started,
            epochs=len(trained.history),
            kept_epoch=kept.number if kept else 0,
            train_loss=kept.train_loss if kept else None,
            validation_loss=kept.validation_loss if kept else None,
            train_count=len(train),
            held_out_count=len(held_out),
            calibration_count=len(scores),
            device=torch.cuda.get_device_name() if teacher.device.type == "cuda" else f"cpu, {teacher.backend}",
        ),
        files=describe_files(files),
    )
    calibrated = dataclasses.replace(
        detector,
        distance_scales=distance_scales,
        calibration=Calibration(np.sort(scores), heatmap_scale),
        model_record=record,
        read_history=lambda: history,
    )
    return FittedModel(calibrated, record, files)


def _build_memory(
    features: TeacherFeatures, train: Indices, recipe: Recipe, report: Reporter
) -> tuple[MemoryBank, ...]:
    start = time.perf_counter()
    memory = build_memory(features, train, recipe)
    if memory:
        count = sum(len(bank.vectors) for bank in memory)
        report(f"memory of {count} vectors in {len(memory)} banks, in {time.perf_counter() - start:.1f} s")
    return memory
