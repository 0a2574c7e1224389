"""Fit one category: read its images, train, calibrate, and publish the model. Runs in a worker."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch

from stpm import storage
from stpm.errors import StpmError, one_line
from stpm.fitting.build_memory import build_memory
from stpm.fitting.calibrate import calibrate_model, cross_validate_scores
from stpm.fitting.fit_checkpoint import StoredCheckpoints
from stpm.fitting.image_problems import find_image_problems, find_outlier, scale_range
from stpm.fitting.splits import Indices, split_images
from stpm.fitting.task import Epoch, FitResult, FitTask, FitWarning
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.train_student import train_student
from stpm.fitting.training_images import TrainingImages, load_images, preprocessing_for
from stpm.method.arithmetic import Arithmetic
from stpm.method.backbones import Backbone
from stpm.method.device import is_out_of_memory
from stpm.method.forward import Matcher, Parts
from stpm.method.memory_bank import MemoryBank
from stpm.method.preprocessing import Preprocessing
from stpm.method.recipe import Precision
from stpm.models.record import FitRecord, ModelRecord
from stpm.models.store import ModelStore
from stpm.options import Backend

log = logging.getLogger(__name__)

Reporter = Callable[[Epoch | str], None]


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker computes with, the bytes of RAM and of GPU RAM that it may use, and seconds between checkpoints."""

    device: torch.device
    arithmetic: Arithmetic
    ram: int
    gpu_ram: int
    checkpoint_seconds: float

    def feature_budget(self, images: TrainingImages) -> int:
        """Return the bytes that the teacher's features may take beside the decoded images."""
        return self.gpu_ram if self.device.type != "cpu" else self._ram_beside(images)

    def distance_budget(self, features: TeacherFeatures) -> int:
        """Return the bytes that distance maps may take beside the decoded images and the teacher's features."""
        cached_in_ram = features.cached and features.matcher.device.type == "cpu"
        return self._ram_beside(features.images) - (features.nbytes if cached_in_ram else 0)

    def _ram_beside(self, images: TrainingImages) -> int:
        return self.ram if images.on_disk else self.ram - images.pixels.nbytes


def fit_category(task: FitTask, settings: WorkerSettings, report: Reporter) -> FitResult:
    """Fit, calibrate and publish one model. Return errors as failed results, so that the worker can go on.

    Args:
        task: the model to fit.
        settings: what this worker computes with, and may use.
        report: called with each finished epoch, and with messages for the log.
    """
    try:
        return FitResult(task, _fit_category(task, settings, report))
    except StpmError as error:
        reason = str(error)
    except torch.cuda.OutOfMemoryError as error:
        # Do not try a smaller batch: it would be another recipe.
        reason = (
            f"{str(error).split('. ', maxsplit=1)[0]}: the device's memory does not hold batches of "
            f"{task.recipe.batch_size} at this size; lower --batch-size or --pixels (or --size), or give each worker "
            "more of a GPU (--gpus-per-worker)"
        )
    except Exception as error:
        log.exception("%s failed", task.key)
        reason = one_line(error)
        if is_out_of_memory(error):
            reason += "; lower --pixels (or --size) or --worker-ram-gib, or give fewer --workers"
    # Outside of the except blocks, no traceback keeps the tensors of the failed fit alive.
    torch.cuda.empty_cache()
    return FitResult(task, reason=reason)


def _fit_category(task: FitTask, settings: WorkerSettings, report: Reporter) -> ModelRecord:
    start = time.perf_counter()
    recipe, store = task.recipe, ModelStore(task.store)
    storage.remove_unfinished(store.folder(task.category))
    features = _load_features(task, settings, report)
    matcher = features.matcher
    train, held_out = split_images(len(features.images), recipe)
    for problem in find_image_problems(features.images, matcher.preprocessing):
        report(FitWarning(problem))
    checkpoints = _make_checkpoints(task, matcher, settings.checkpoint_seconds)
    memory = _build_memory(features, train, task, report)
    trained = train_student(features, train, held_out, recipe, report, checkpoints[0])
    parts = Parts.from_weights(recipe, trained.student, memory).to(matcher.device)
    budget = settings.distance_budget(features)
    scores, heatmap_scale, distance_scales = calibrate_model(parts, features, held_out, recipe, budget)
    calibrating = held_out
    if recipe.calibration_folds:
        report(f"fitting {task.fit_count - 1} more models, to calibrate on every image")
        scores = cross_validate_scores(features, recipe, checkpoints[1:], budget)
        calibrating = np.arange(len(scores))
    if outlier := find_outlier(scores, [task.train[i][0] for i in calibrating]):
        report(FitWarning(outlier))
    added_folder = f"{store.added_folder(task.category)}/"
    is_added = np.array([uri.startswith(added_folder) for uri, _ in task.train])
    kept = trained.kept_epoch
    history = pa.Table.from_pylist([dataclasses.asdict(epoch) for epoch in trained.history])
    fit = FitRecord(
        seconds=time.perf_counter() - start,
        epochs=len(trained.history),
        kept_epoch=kept.number if kept else 0,
        train_loss=kept.train_loss if kept else None,
        validation_loss=kept.validation_loss if kept else None,
        train_count=len(train),
        held_out_count=len(held_out),
        calibration_count=len(scores),
        device=torch.cuda.get_device_name() if matcher.device.type == "cuda" else f"cpu, {matcher.backend}",
    )
    record = store.save(
        ModelRecord(
            category=task.category,
            recipe=recipe,
            preprocessing=matcher.preprocessing,
            precision=matcher.precision,
            teacher_digest=task.teacher_digest,
            heatmap_scale=heatmap_scale,
            distance_scales=distance_scales,
            fit=fit,
            added_images=tuple(dataclasses.replace(image, fitted=True) for image in task.added),
        ),
        task.data_fingerprint,
        student=trained.student,
        memory=memory,
        calibration=pa.table({"score": scores, "is_added": is_added[calibrating]}),
        image_statistics=features.images.statistics_table,
        history=history,
        stage=task.stage,
    )
    try:
        store.remove_checkpoints(task.category)
    except OSError as error:
        # The model is published. A later fit takes no checkpoint of other images or of another recipe.
        report(FitWarning(f"its checkpoints are left: {error}"))
    return record


def _load_features(task: FitTask, settings: WorkerSettings, report: Reporter) -> TeacherFeatures:
    """Decode the training images, and compute the teacher's features if they fit into RAM."""
    start = time.perf_counter()
    uris = [uri for uri, _ in task.train]
    preprocessing = preprocessing_for(task.recipe, uris)
    images = load_images(uris, preprocessing, settings.ram)
    seconds = time.perf_counter() - start
    teacher = _load_teacher(task.store, task.recipe.teacher, task.recipe.levels, task.teacher_digest)
    precision = settings.arithmetic.precision_to_fit(task.recipe.precision)
    matcher = _make_matcher(teacher, preprocessing, settings.device, precision, settings.arithmetic.backend)
    features = TeacherFeatures(matcher, images, settings.feature_budget(images))
    report(
        f"{len(images)} images decoded in {seconds:.1f} s, in {'a file' if images.on_disk else 'memory'}; teacher's "
        f"features {'cached' if features.cached else 'recomputed'} ({features.nbytes / 2**20:.0f} MiB); "
        f"input {preprocessing.size_text}, at {_percent(*scale_range(images, preprocessing))} of the images' size; "
        f"{precision}, {matcher.backend}"
    )
    return features


def _percent(smallest: float, largest: float) -> str:
    low, high = f"{smallest:.0%}", f"{largest:.0%}"
    return low if low == high else f"{low} to {high}"


@lru_cache(maxsize=1)
def _load_teacher(store: str, teacher: str, levels: tuple[int, ...], digest: str) -> Backbone:
    """Load a teacher once for all tasks of a worker."""
    return ModelStore(store).load_teacher(teacher, levels, digest)


@lru_cache(maxsize=1)
def _make_matcher(
    teacher: Backbone, preprocessing: Preprocessing, device: torch.device, precision: Precision, backend: Backend
) -> Matcher:
    """Compile the teacher once for tasks in a row whose input is the same."""
    return Matcher(teacher, preprocessing, device, precision, backend)


def _make_checkpoints(task: FitTask, matcher: Matcher, interval: float) -> list[StoredCheckpoints]:
    """Make the checkpoints of the model's student, and of the student of each fold."""
    store = ModelStore(task.store)
    computed_by = (matcher.preprocessing, matcher.precision, matcher.device.type, matcher.backend)
    fingerprint = "-".join(map(str, (task.fingerprint, *computed_by)))
    return [
        StoredCheckpoints(
            store.checkpoint_uri(task.category, number), fingerprint, interval, save_end=task.fit_count > 1
        )
        for number in range(task.fit_count)
    ]


def _build_memory(features: TeacherFeatures, train: Indices, task: FitTask, report: Reporter) -> tuple[MemoryBank, ...]:
    start = time.perf_counter()
    memory = build_memory(features, train, task.recipe)
    if memory:
        count = sum(len(bank.vectors) for bank in memory)
        report(f"memory of {count} vectors in {len(memory)} banks, in {time.perf_counter() - start:.1f} s")
    return memory
