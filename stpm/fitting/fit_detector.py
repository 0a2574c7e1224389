"""Fit and calibrate one detector in this process. No Ray, and no store unless the detector is published."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch

from stpm import storage
from stpm.data import pictures
from stpm.data.pictures import Picture
from stpm.detector import Detector
from stpm.fitting.build_memory import MemoryCandidates
from stpm.fitting.calibrate import calibrate
from stpm.fitting.checkpoint import Checkpoint
from stpm.fitting.groups import group_images
from stpm.fitting.outliers import PAGE, find_outliers
from stpm.fitting.splits import Indices, split_folds, split_images
from stpm.fitting.task import Epoch, FitWarning
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.train_student import train_student
from stpm.fitting.training_images import load_images
from stpm.fitting.turns import in_turns
from stpm.method.backbones import teacher_licence
from stpm.method.calibration import Calibration, describe_promise
from stpm.method.memory_bank import MemoryBank
from stpm.method.preprocessing import Preprocessing
from stpm.method.recipe import Recipe
from stpm.method.roi import Roi
from stpm.method.teacher import Teacher
from stpm.models.record import Decision, FitRecord, ModelRecord
from stpm.models.store import ModelStore, describe_files, encode_model

Reporter = Callable[[Epoch | str], None]
Banks = tuple[MemoryBank, ...]


def fit_detector(
    teacher: Teacher,
    recipe: Recipe,
    images: Sequence[Picture],
    report: Reporter,
    *,
    started: float,
    ram: int,
    gpu_ram: int,
    teacher_digest: str,
    data_fingerprint: str,
    roi: Roi | None = None,
    rois: Mapping[str, str] | None = None,
    decision: Decision | None = None,
    checkpoint: Checkpoint | None = None,
) -> Detector:
    """Decode the images, train the student, build the memory, and calibrate.

    Args:
        teacher: the frozen teacher, with the preprocessing.
        recipe: how to fit, with the epochs that `Recipe.for_image_count` gives it.
        images: the good images.
        report: called with each finished epoch, and with messages for the log.
        started: when the fit began, `time.perf_counter()`.
        ram: bytes of RAM for decoded images (beyond it they go to a file), and on a CPU for the teacher's features,
            and for distance maps (beyond it they are computed again).
        gpu_ram: bytes of a GPU's memory for the teacher's features.
        teacher_digest: SHA-256 of the teacher's weights.
        data_fingerprint: of the images, see `stpm.fitting.task.fingerprint`; a store keeps it.
        roi: the part of the images that is inspected; None: all of what the teacher sees.
        rois: by an image's URI, that of the mask of its own region of interest.
        decision: the threshold that the model begins with; None: none.
        checkpoint: of the student's training.

    Returns:
        The detector, which can be published to a store that has its teacher. Its record names no category.

    Raises:
        ConfigError: if a level has a single position.
        DataError: if there are too few images, or some cannot be read.
        DivergedError: if a loss is not finite.
    """
    preprocessing = dataclasses.replace(teacher.preprocessing, roi=roi)
    with in_turns(teacher.device):
        features = _load(teacher, preprocessing, images, rois, report, ram, gpu_ram)
        groups = group_images([pictures.name_of(image) for image in images], features.images.pixels, recipe)
        train, held_out = split_images(groups, recipe)
        for problem in features.images.find_problems():
            report(FitWarning(problem))
        memory, parts = _build_banks(features, groups, train, held_out, recipe, report)
        trained = train_student(features, train, held_out, recipe, report, checkpoint)
        detector = dataclasses.replace(Detector.assemble(teacher, recipe, trained.student, memory), roi=roi)
        scores, heatmap_scale, distance_scales, max_pixels = calibrate(detector, features, parts, held_out)
        calibrating = np.sort(np.concatenate([part for _, part in parts]))
        suspicious, page = find_outliers(features, calibrating, scores, recipe.seed)
    if suspicious:
        report(FitWarning(suspicious))
    if decision:
        report(f"the threshold is {decision}. {describe_promise(scores, decision.threshold)}")
    kept = trained.kept_epoch
    history = pa.Table.from_pylist([dataclasses.asdict(epoch) for epoch in trained.history])
    files = encode_model(
        trained.student,
        memory,
        pa.table({"score": scores, "max_pixel": max_pixels, "is_added": np.zeros(len(scores), bool)}),
        features.images.statistics_table,
        history,
    )
    files[PAGE] = page
    record = ModelRecord(
        category="",
        recipe=recipe,
        preprocessing=preprocessing,
        precision=teacher.precision,
        teacher_digest=teacher_digest,
        teacher_licence="" if recipe.teacher_weights else teacher_licence(recipe.teacher),
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
        decision=decision,
        files=describe_files(files),
    )

    def publish(store: ModelStore, category: str) -> ModelRecord:
        stored = store.save(dataclasses.replace(record, category=category), files, data_fingerprint)
        shown = storage.join(store.folder(category), stored.model_id, PAGE)
        report(f"good images, those unlike all others first: {shown}")
        return stored

    return dataclasses.replace(
        detector,
        distance_scales=distance_scales,
        calibration=Calibration(np.sort(scores), heatmap_scale, np.sort(max_pixels)),
        model_record=record,
        publish=publish,
        read_history=lambda: history,
    )


def _build_banks(
    features: TeacherFeatures, groups: Indices, train: Indices, held_out: Indices, recipe: Recipe, report: Reporter
) -> tuple[Banks, list[tuple[Banks, Indices]]]:
    """Build a model's memory banks, and those to calibrate with, each with the images that they do not hold."""
    if not recipe.memory:
        return (), [((), held_out)]
    started = time.perf_counter()
    candidates = MemoryCandidates(features, np.arange(len(groups)) if recipe.folds else train, recipe)
    memory = candidates.banks
    count, seconds = sum(len(bank.vectors) for bank in memory), time.perf_counter() - started
    report(f"memory of {count} vectors in {len(memory)} banks, in {seconds:.1f} s")
    if not recipe.folds:
        return memory, [(memory, held_out)]
    folds = split_folds(groups, recipe)
    parts = [(candidates.banks_without(fold), fold) for fold in folds]
    report(f"the same without each of {len(folds)} folds, in {time.perf_counter() - started - seconds:.1f} s")
    return memory, parts


def _load(
    teacher: Teacher,
    preprocessing: Preprocessing,
    pictures: Sequence[Picture],
    rois: Mapping[str, str] | None,
    report: Reporter,
    ram: int,
    gpu_ram: int,
) -> TeacherFeatures:
    """Decode images, and compute a teacher's features of them if they fit into the memory."""
    started = time.perf_counter()
    images = load_images(pictures, preprocessing, ram, rois)
    seconds = time.perf_counter() - started
    features = TeacherFeatures(teacher, images, ram, gpu_ram)
    smallest, largest = (f"{scale:.0%}" for scale in images.scale_range())
    report(
        f"{len(images)} images decoded in {seconds:.1f} s, in {'a file' if images.on_disk else 'memory'}; teacher's "
        f"features {'cached' if features.cached else 'recomputed'} ({features.nbytes / 2**20:.0f} MiB); input "
        f"{teacher.preprocessing.size_text}, at {smallest if smallest == largest else f'{smallest} to {largest}'} of "
        f"the images' size; {teacher.precision}, {teacher.backend}"
    )
    return features
