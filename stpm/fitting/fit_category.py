"""What a worker does with a task: images from storage, a model into the store."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa
import torch

from stpm import storage
from stpm.errors import ModelError, StpmError
from stpm.fitting.calibrate import calibrate_model, k_fold_scores, make_parts
from stpm.fitting.coreset import build_memory
from stpm.fitting.fit_checkpoint import StoredCheckpoints
from stpm.fitting.task import Epoch, FitTask, Outcome
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.train_student import fit, split
from stpm.fitting.training_images import TrainingImages, load_images, preprocessing_for
from stpm.method.backbones import Backbone
from stpm.method.calibration import Calibration
from stpm.method.forward import Matcher, pick_device, resolve_precision
from stpm.models.record import FitSummary, ModelRecord
from stpm.models.store import ModelStore
from stpm.pages.loss_chart import loss_png


@dataclass(frozen=True)
class Limits:
    """What one worker may take: bytes of memory, bytes of its device's memory, seconds between checkpoints."""

    memory: int
    device_memory: int
    checkpoint_seconds: float

    def room_for_features(self, images: TrainingImages, device: torch.device) -> int:
        """Bytes that the teacher's features may take beside the decoded images."""
        if device.type != "cpu":
            return self.device_memory
        return self._beside(images)

    def room_for_distances(self, features: TeacherFeatures) -> int:
        """Bytes that distance maps may take beside the decoded images and the teacher's features."""
        on_cpu = features.kept and features.matcher.device.type == "cpu"
        return self._beside(features.images) - (features.size if on_cpu else 0)

    def _beside(self, images: TrainingImages) -> int:
        return self.memory if images.on_disk else self.memory - images.pixels.nbytes


def existing_model(task: FitTask) -> ModelRecord | None:
    """The model in the store, if it is the one that the task would make.

    Raises:
        ModelError: if it is, and one of its files is missing or damaged.
    """
    store = ModelStore(task.store)
    try:
        current = store.current(task.category)
        record = store.record(task.category, current.model_id)
    except ModelError:
        return None
    ours = (task.recipe, task.teacher_digest, task.data_fingerprint)
    if ours != (record.recipe, record.teacher_digest, current.data_fingerprint):
        return None
    store.verify(record)
    return record


class OutOfDeviceMemoryError(StpmError):
    """A GPU that is too small for a recipe. No batch is halved for it: that would be another recipe."""


def run_task(task: FitTask, limits: Limits, tell: Callable[[Epoch | str], None]) -> Outcome:
    """Fit, calibrate and publish one model.

    Args:
        task: what.
        limits: what it may take.
        tell: told of each epoch, and of choices that were made, in words.

    Raises:
        StpmError: if the images, the teacher, the loss or the device's memory forbid it.
    """
    try:
        return _run_task(task, limits, tell)
    except torch.cuda.OutOfMemoryError as error:
        reason = str(error).split(". ", maxsplit=1)[0]
    # Here no frame of the failed fit holds its tensors any more, and the next task finds the memory free.
    torch.cuda.empty_cache()
    raise OutOfDeviceMemoryError(
        f"{reason}: the device's memory does not hold batches of {task.recipe.batch_size} at this size; lower "
        "--batch-size or --pixels (or --size), or give each worker more of a GPU (--gpus-per-worker)"
    )


def _run_task(task: FitTask, limits: Limits, tell: Callable[[Epoch | str], None]) -> Outcome:
    start = time.perf_counter()
    recipe = task.recipe
    store = ModelStore(task.store)
    storage.sweep(store.folder(task.category))
    device = pick_device()
    precision = resolve_precision(recipe.precision, device)
    teacher = _teacher(task.store, recipe.teacher, recipe.levels, task.teacher_digest)
    uris = [uri for uri, _ in task.train]
    preprocessing = preprocessing_for(recipe, uris)
    matcher = Matcher(teacher, preprocessing, device, precision)
    images = load_images(uris, preprocessing, limits.memory)
    seconds = time.perf_counter() - start
    features = TeacherFeatures(matcher, images, limits.room_for_features(images, device))
    tell(
        f"{len(images)} images decoded in {seconds:.1f} s, in {'a file' if images.on_disk else 'memory'}; teacher's "
        f"features {'kept' if features.kept else 'computed anew'} ({features.size / 2**20:.0f} MiB); "
        f"input {preprocessing.size}, {precision}"
    )
    fingerprint = f"{task.fingerprint}-{preprocessing}-{precision}-{device.type}"
    checkpoints, *of_folds = (
        StoredCheckpoints(
            store.checkpoint_uri(task.category, number),
            fingerprint,
            limits.checkpoint_seconds,
            keep_end=recipe.calibration_folds > 0,
        )
        for number in range(recipe.calibration_folds + 1)
    )
    train, held_out = split(len(images), recipe)
    start_memory = time.perf_counter()
    memory = build_memory(features, train, recipe)
    if memory:
        kept = sum(len(bank.vectors) for bank in memory)
        tell(f"memory of {kept} vectors in {len(memory)} banks, in {time.perf_counter() - start_memory:.1f} s")
    fitted = fit(features, train, held_out, recipe, tell, checkpoints)
    history = pa.Table.from_pylist([dataclasses.asdict(epoch) for epoch in fitted.history])
    parts = make_parts(fitted.student, memory, recipe, device)
    room = limits.room_for_distances(features)
    calibrated = calibrate_model(parts, features, held_out, recipe, room)
    calibration = calibrated.calibration
    if recipe.calibration_folds:
        tell(f"fitting {recipe.fold_count(len(images))} more models, to calibrate on every image")
        calibration = Calibration(k_fold_scores(features, recipe, of_folds, room), calibration.scale)
    summary = FitSummary(
        seconds=time.perf_counter() - start,
        epochs=len(fitted.history),
        kept_epoch=fitted.kept.number if fitted.kept else 0,
        train_loss=fitted.kept.train_loss if fitted.kept else None,
        validation_loss=fitted.kept.validation_loss if fitted.kept else None,
        train_count=len(train),
        validation_count=len(held_out),
        calibration_count=len(calibration.scores),
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    )
    record = store.save(
        ModelRecord(
            category=task.category,
            recipe=recipe,
            preprocessing=preprocessing,
            precision=precision,
            teacher_digest=task.teacher_digest,
            heatmap_scale=calibration.scale,
            part_scales=calibrated.scales,
            fit=summary,
        ),
        task.data_fingerprint,
        student=fitted.student,
        memory=memory,
        calibration_scores=calibration.scores,
        history=history,
        picture=loss_png(history.to_pydict(), fitted.kept.number, task.category) if fitted.kept else b"",
    )
    for checkpoint in (checkpoints, *of_folds):
        checkpoint.clear()
    return Outcome.done(task, record, "fitted")


@lru_cache(maxsize=1)
def _teacher(store: str, teacher: str, levels: tuple[int, ...], digest: str) -> Backbone:
    """A worker's tasks share their teacher."""
    return ModelStore(store).load_teacher(teacher, levels, digest)
