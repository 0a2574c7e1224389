"""What a worker does with a task: images from storage, a model into the store."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch

from stpm import images, storage
from stpm.calibration import Calibration
from stpm.errors import DataError, ImageError, ModelError
from stpm.fitting.checkpoint import StoredCheckpoints
from stpm.fitting.curves import loss_curves
from stpm.fitting.features import TeacherFeatures
from stpm.fitting.held_out import calibrate_student, cross_fitted
from stpm.fitting.loop import fit, split
from stpm.fitting.task import Epoch, FitTask, Outcome
from stpm.forward import Matcher, pick_device, resolve_precision
from stpm.models import ModelStore
from stpm.networks import Trunk
from stpm.record import FitSummary, ModelRecord

_READERS = 8
_SHOWN_FILES = 5


@dataclass(frozen=True)
class Limits:
    """What one worker may take: bytes of memory, bytes of its device's memory, seconds between checkpoints."""

    memory: int
    device_memory: int
    checkpoint_seconds: float

    def room_for_features(self, pixels: images.Pixels, device: torch.device) -> int:
        """Bytes that the teacher's features may take beside the decoded images."""
        if device.type != "cpu":
            return self.device_memory
        return self.memory if _on_disk(pixels) else self.memory - pixels.nbytes


def existing_model(task: FitTask) -> ModelRecord | None:
    """The model in the store, if it is the one that the task would make."""
    try:
        record = ModelStore(task.store).record(task.category)
    except ModelError:
        return None
    ours = (task.recipe, task.teacher_digest, task.data_fingerprint)
    return record if ours == (record.recipe, record.teacher_digest, record.data_fingerprint) else None


def run_task(task: FitTask, limits: Limits, tell: Callable[[Epoch | str], None]) -> Outcome:
    """Fit, calibrate and publish one model.

    Args:
        task: what.
        limits: what it may take.
        tell: told of each epoch, and of choices that were made, in words.

    Raises:
        StpmError: if the images, the teacher or the loss forbid it.
    """
    start = time.perf_counter()
    recipe = task.recipe
    store = ModelStore(task.store)
    storage.sweep(store.folder(task.category))
    device = pick_device()
    precision = resolve_precision(recipe.precision, device)
    teacher = _teacher(task.store, recipe.teacher, recipe.levels, task.teacher_digest)
    matcher = Matcher(teacher, recipe, device, precision)
    pixels = load_pixels([uri for uri, _ in task.train], recipe.view, limits.memory)
    seconds = time.perf_counter() - start
    features = TeacherFeatures(matcher, pixels, limits.room_for_features(pixels, device))
    tell(
        f"{len(pixels)} images decoded in {seconds:.1f} s, in {'a file' if _on_disk(pixels) else 'memory'}; teacher's "
        f"features {'kept' if features.kept else 'computed anew'} ({features.size / 2**20:.0f} MiB); {precision}"
    )
    fingerprint = f"{task.fingerprint}-{precision}-{device.type}"
    checkpoints, *of_folds = (
        StoredCheckpoints(
            store.checkpoint_uri(task.category, number),
            fingerprint,
            limits.checkpoint_seconds,
            keep_end=recipe.calibration_folds > 0,
        )
        for number in range(recipe.calibration_folds + 1)
    )
    train, held_out = split(len(pixels), recipe)
    fitted = fit(features, train, held_out, recipe, tell, checkpoints)
    calibration, statistics = calibrate_student(fitted.student, matcher, pixels, held_out, recipe)
    if recipe.calibration_folds:
        tell(f"fitting {recipe.calibration_folds} more students, to calibrate on every image")
        calibration = Calibration(cross_fitted(features, pixels, recipe, of_folds), calibration.scale)
    record = store.save(
        category=task.category,
        recipe=recipe,
        precision=precision,
        teacher_digest=task.teacher_digest,
        data_fingerprint=task.data_fingerprint,
        student=fitted.student,
        calibration=calibration,
        statistics=statistics,
        history=pa.Table.from_pylist([dataclasses.asdict(epoch) for epoch in fitted.history]),
        picture=loss_curves(fitted.history, fitted.kept.number, task.category),
        fit=FitSummary(
            seconds=time.perf_counter() - start,
            epochs=len(fitted.history),
            kept_epoch=fitted.kept.number,
            train_loss=fitted.kept.train_loss,
            validation_loss=fitted.kept.validation_loss,
            train_count=len(train),
            validation_count=len(held_out),
            calibration_count=len(calibration.scores),
            device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        ),
    )
    for kept in (checkpoints, *of_folds):
        kept.clear()
    return Outcome.done(task, record, "fitted")


@lru_cache(maxsize=1)
def _teacher(store: str, teacher: str, levels: tuple[int, ...], digest: str) -> Trunk:
    """A worker's tasks share their teacher."""
    return ModelStore(store).load_teacher(teacher, levels, digest)


def load_pixels(uris: list[str], view: images.View, budget: int) -> images.Pixels:
    """Decode images into one (N, size, size, 3) uint8 array: in memory within a budget of bytes, else in a file.

    Raises:
        DataError: naming the files that cannot be read. A student is not fitted on what is left, since a set that
            lost images silently is not the set that its owner chose.
    """
    shape = (len(uris), view.size, view.size, 3)
    pixels = np.empty(shape, np.uint8) if math.prod(shape) <= budget else _file_backed(shape)
    problems: list[str] = []

    def load(index: int) -> None:
        try:
            pixels[index] = images.decode(storage.read(uris[index]), view).pixels
        except (ImageError, OSError) as error:
            problems.append(f"{uris[index]}: {error}")

    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(load, range(len(uris))))
    if problems:
        shown = "; ".join(sorted(problems)[:_SHOWN_FILES])
        more = f"; and {len(problems) - _SHOWN_FILES} more" if len(problems) > _SHOWN_FILES else ""
        raise DataError(
            f"{len(problems)} of {len(uris)} training images cannot be read: {shown}{more}; repair or remove them"
        )
    return pixels


def _file_backed(shape: tuple[int, ...]) -> images.Pixels:
    # The file has no name, so that it is gone with the process, however that ends.
    with tempfile.TemporaryFile() as file:
        try:
            # A file with holes would be accepted, and kill the process at the first page that the disk has no room for.
            os.posix_fallocate(file.fileno(), 0, math.prod(shape))
        except OSError as error:
            raise DataError(
                f"no room for {math.prod(shape) / 2**30:.2f} GiB of decoded images in {tempfile.gettempdir()} "
                f"({error.strerror}); free some, set TMPDIR to a larger disk, or raise --memory-gib"
            ) from error
        return np.memmap(file, np.uint8, "r+", shape=shape)


def _on_disk(pixels: images.Pixels) -> bool:
    return isinstance(pixels, np.memmap)
