"""Fit one category in a worker: take up its checkpoints, fit its detector, and publish it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import lru_cache

import ray
import torch

from stpm import storage
from stpm.errors import StpmError, one_line
from stpm.fitting.checkpoint import Checkpoint
from stpm.fitting.fit_detector import Reporter, fit_detector
from stpm.fitting.options import WorkerOptions
from stpm.fitting.task import FitResult, FitTask, FitWarning
from stpm.fitting.training_images import preprocessing_for
from stpm.method.arithmetic import Arithmetic
from stpm.method.device import is_out_of_memory
from stpm.method.teacher import Teacher
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.shared_teachers import TeacherSpec, load_teacher

# Fraction of a node's RAM, and of a GPU's free RAM, that all its workers may use together.
_RAM_FRACTION = 0.5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker computes with, the bytes of RAM and of GPU RAM that it may use, and seconds between checkpoints."""

    device: torch.device
    arithmetic: Arithmetic
    ram: int
    gpu_ram: int
    checkpoint_seconds: float

    @classmethod
    def of_this_worker(cls, options: WorkerOptions, arithmetic: Arithmetic, device: torch.device) -> WorkerSettings:
        """Use the cores that Ray assigned to this worker, and its share of RAM and of its GPU."""
        context = ray.get_runtime_context()
        assigned = context.get_assigned_resources()
        torch.set_num_threads(max(int(assigned.get("CPU", 1)), 1))
        node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())["Resources"]
        ram = node["memory"] * _RAM_FRACTION * assigned.get("CPU", 1) / max(node.get("CPU", 1), 1)
        gpu_ram = torch.cuda.mem_get_info()[0] * _RAM_FRACTION if device.type == "cuda" else 0
        return cls(
            device,
            arithmetic,
            ram=int(options.worker_ram_gib * 2**30 or ram),
            gpu_ram=int(gpu_ram * min(assigned.get("GPU", 0), 1)),
            checkpoint_seconds=options.checkpoint_seconds,
        )


def fit_category(task: FitTask, settings: WorkerSettings, report: Reporter) -> FitResult:
    """Fit, calibrate and publish one model; report each finished epoch, and messages for the log.

    Return errors as failed results, so that the worker can go on.
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
    store, digest, uris = ModelStore(task.store), task.teacher_digest, [uri for uri, _ in task.train]
    storage.remove_unfinished(store.folder(task.category))
    preprocessing = preprocessing_for(task.recipe, uris, task.roi)
    rois = {image: uri for image, uri, _ in task.rois}
    spec = TeacherSpec.to_fit(task.recipe, digest, preprocessing, settings.device, settings.arithmetic)
    teacher = last_teacher(task.store, spec)
    computed_by = (teacher.preprocessing, teacher.precision, teacher.device.type, teacher.backend)
    fingerprint = "-".join(map(str, (task.fingerprint, *computed_by)))
    detector = fit_detector(
        teacher,
        task.recipe,
        uris,
        report,
        started=started,
        ram=settings.ram,
        gpu_ram=settings.gpu_ram,
        teacher_digest=digest,
        data_fingerprint=task.data_fingerprint,
        roi=task.roi,
        rois=rois,
        decision=task.decision,
        checkpoint=Checkpoint(store.checkpoint_uri(task.category), fingerprint, settings.checkpoint_seconds),
    )
    record = detector.publish(store, task.category)
    try:
        storage.remove(store.checkpoint_uri(task.category))
    except OSError as error:
        # The model is published. A later fit takes no checkpoint of other images or of another recipe.
        report(FitWarning(f"its checkpoint is left: {error}"))
    return record


@lru_cache(maxsize=1)
def last_teacher(store: str, spec: TeacherSpec) -> Teacher:
    """Load a teacher, and keep the last one: tasks in a row often have the same input."""
    return load_teacher(ModelStore(store), spec)
