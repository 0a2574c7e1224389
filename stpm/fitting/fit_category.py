"""Fit one category: read its images, train, calibrate, and publish the model. Runs in a worker."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from stpm import storage
from stpm.data.pictures import Picture
from stpm.errors import StpmError, one_line
from stpm.fitting.fit_checkpoint import StoredCheckpoints
from stpm.fitting.fit_detector import Reporter, fit_detector
from stpm.fitting.image_problems import scale_range
from stpm.fitting.task import FitResult, FitTask, FitWarning
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.training_images import TrainingImages, load_images, preprocessing_for
from stpm.method.arithmetic import Arithmetic
from stpm.method.backbones import Backbone
from stpm.method.device import is_out_of_memory
from stpm.method.preprocessing import Preprocessing
from stpm.method.recipe import Precision
from stpm.method.teacher import Teacher
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.options import Backend

log = logging.getLogger(__name__)


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
        cached_in_ram = features.cached and features.teacher.device.type == "cpu"
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
    started = time.perf_counter()
    store = ModelStore(task.store)
    storage.remove_unfinished(store.folder(task.category))
    features = _load_features(task, settings, report)
    fitted = fit_detector(
        features,
        task.recipe,
        [uri for uri, _ in task.train],
        report,
        started=started,
        distance_budget=settings.distance_budget(features),
        category=task.category,
        teacher_digest=task.teacher_digest,
        checkpoints=_make_checkpoints(task, features.teacher, settings.checkpoint_seconds),
    )
    record = store.save(fitted.record, fitted.files, task.data_fingerprint)
    try:
        store.remove_checkpoints(task.category)
    except OSError as error:
        # The model is published. A later fit takes no checkpoint of other images or of another recipe.
        report(FitWarning(f"its checkpoints are left: {error}"))
    return record


def _load_features(task: FitTask, settings: WorkerSettings, report: Reporter) -> TeacherFeatures:
    """Decode the training images, and compute the teacher's features if they fit into RAM."""
    uris = [uri for uri, _ in task.train]
    preprocessing = preprocessing_for(task.recipe, uris)
    backbone = _load_backbone(task.store, task.recipe.teacher, task.recipe.levels, task.teacher_digest)
    precision = settings.arithmetic.precision_to_fit(task.recipe.precision)
    teacher = _make_teacher(backbone, preprocessing, settings.device, precision, settings.arithmetic.backend)
    return compute_features(teacher, uris, settings, report)


def compute_features(
    teacher: Teacher, pictures: Sequence[Picture], settings: WorkerSettings, report: Reporter
) -> TeacherFeatures:
    """Decode images, and compute a teacher's features of them if they fit into the memory.

    Raises:
        DataError: if some cannot be read.
    """
    start = time.perf_counter()
    preprocessing = teacher.preprocessing
    images = load_images(pictures, preprocessing, settings.ram)
    seconds = time.perf_counter() - start
    features = TeacherFeatures(teacher, images, settings.feature_budget(images))
    report(
        f"{len(images)} images decoded in {seconds:.1f} s, in {'a file' if images.on_disk else 'memory'}; teacher's "
        f"features {'cached' if features.cached else 'recomputed'} ({features.nbytes / 2**20:.0f} MiB); "
        f"input {preprocessing.size_text}, at {_percent(*scale_range(images, preprocessing))} of the images' size; "
        f"{teacher.precision}, {teacher.backend}"
    )
    return features


def _percent(smallest: float, largest: float) -> str:
    low, high = f"{smallest:.0%}", f"{largest:.0%}"
    return low if low == high else f"{low} to {high}"


@lru_cache(maxsize=1)
def _load_backbone(store: str, teacher: str, levels: tuple[int, ...], digest: str) -> Backbone:
    """Load a teacher once for all tasks of a worker."""
    return ModelStore(store).load_teacher(teacher, levels, digest)


@lru_cache(maxsize=1)
def _make_teacher(
    backbone: Backbone, preprocessing: Preprocessing, device: torch.device, precision: Precision, backend: Backend
) -> Teacher:
    """Compile the teacher once for tasks in a row whose input is the same."""
    return Teacher(backbone, preprocessing, device, precision, backend)


def _make_checkpoints(task: FitTask, teacher: Teacher, interval: float) -> list[StoredCheckpoints]:
    """Make the checkpoints of the model's student, and of the student of each fold."""
    store = ModelStore(task.store)
    computed_by = (teacher.preprocessing, teacher.precision, teacher.device.type, teacher.backend)
    fingerprint = "-".join(map(str, (task.fingerprint, *computed_by)))
    return [
        StoredCheckpoints(
            store.checkpoint_uri(task.category, number), fingerprint, interval, save_end=task.fit_count > 1
        )
        for number in range(task.fit_count)
    ]
