"""`stpm.fit`: fit a detector in this process, without Ray."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from stpm import storage
from stpm.data import pictures
from stpm.data.decoding import SUFFIXES
from stpm.data.mvtec import is_image
from stpm.data.pictures import Picture
from stpm.data.rois import parse_roi
from stpm.detector import Detector
from stpm.errors import DataError
from stpm.fitting.fit_detector import fit_detector
from stpm.fitting.task import Epoch, FitWarning, fingerprint
from stpm.fitting.training_images import preprocessing_for
from stpm.method.arithmetic import choose_arithmetic
from stpm.method.backbones import load_backbone, serialise
from stpm.method.device import device_capabilities, local_device
from stpm.method.recipe import PRESETS, Preset, Recipe
from stpm.method.roi import Roi
from stpm.method.teacher_weights import load_teacher_weights
from stpm.method.views import levels_of_teacher
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.options import WantedBackend
from stpm.shared_teachers import TeacherSpec, share_teacher

log = logging.getLogger(__name__)

# Fraction of the memory that decoded images, features and distances may take.
_RAM_FRACTION = 0.5


def fit(
    images: str | os.PathLike[str] | Iterable[Picture],
    recipe: Recipe | None = None,
    *,
    preset: Preset = "default",
    teacher: str = "",
    teacher_weights: str = "",
    seed: int | None = None,
    roi: str | os.PathLike[str] | npt.NDArray[np.bool_] | None = None,
    backend: WantedBackend = "auto",
    progress: bool = True,
) -> Detector:
    """Fit and calibrate a detector on defect-free images.

    Args:
        images: a folder (path or URI) of good images, such as `data/hazelnut/train/good`; or good images: paths, URIs,
            PIL images or arrays, see `stpm.data.pictures.Picture`.
        recipe: how to fit; None: that of the preset. To change some of its values:
            `dataclasses.replace(stpm.PRESETS["default"], size=256)`.
        preset: `default`, `paper` or `notebook`; used without a recipe.
        teacher: replaces the recipe's: ARCHITECTURE.TAG of timm, or `demo`, the packaged one.
        teacher_weights: replaces the recipe's: a file, or `random`.
        seed: replaces the recipe's.
        roi: what to inspect of each image: a mask of its size, (height, width) bool; a mask's path or URI, white where
            images are inspected; or polygons in pixels, as in `10,10 200,10 200,180; …`; None: all of it.
        backend: what computes features on a CPU: `pytorch`, or `openvino`, which is faster there; `auto`: OpenVINO
            where it is installed.
        progress: show a progress bar.

    Raises:
        ConfigError: if the teacher is unknown, or its weights cannot be had.
        DataError: if there are too few images, or some cannot be read.
        DivergedError: if a loss is not finite.
    """
    started = time.perf_counter()
    versions = _list(images)
    listed = [picture for picture, _ in versions]
    recipe = recipe or PRESETS[preset]
    recipe = dataclasses.replace(
        recipe,
        teacher=teacher or recipe.teacher,
        teacher_weights=teacher_weights or recipe.teacher_weights,
        seed=recipe.seed if seed is None else seed,
    ).for_image_count(len(listed))
    recipe.check_image_count(len(listed))
    region = _read_roi(roi, listed[0])
    levels = levels_of_teacher(recipe)
    weights = load_teacher_weights(recipe.teacher, recipe.teacher_weights, levels)
    digest = storage.digest(serialise(weights))
    device = local_device()
    arithmetic = choose_arithmetic([device_capabilities(device)], backend)
    spec = TeacherSpec.to_fit(recipe, digest, preprocessing_for(recipe, listed, region), device, arithmetic)
    epochs = 0 if recipe.student == "none" else recipe.epochs
    with tqdm(total=epochs + 1, desc="fit", disable=not progress) as bar:

        def report(event: Epoch | str) -> None:
            if isinstance(event, Epoch):
                bar.update()
                bar.set_postfix(loss=f"{event.train_loss:.4f}", validation=f"{event.validation_loss:.4f}")
            elif isinstance(event, FitWarning):
                warnings.warn(event, stacklevel=2)
            else:
                log.info(event)

        detector = fit_detector(
            share_teacher(spec, lambda: load_backbone(recipe.teacher, levels, weights, recipe.teacher)),
            recipe,
            listed,
            report,
            started=started,
            ram=_free_ram(),
            gpu_ram=_free_gpu_ram(device),
            teacher_digest=digest,
            data_fingerprint=fingerprint(versions),
            roi=region,
        )
        # The last step: calibrated.
        bar.update()

    def publish(store: ModelStore, category: str) -> ModelRecord:
        store.put_teacher(weights)
        return detector.publish(store, category)

    return dataclasses.replace(detector, publish=publish)


def _read_roi(roi: str | os.PathLike[str] | npt.NDArray[np.bool_] | None, image: Picture) -> Roi | None:
    if roi is None:
        return None
    return Roi.of_mask(roi) if isinstance(roi, np.ndarray) else parse_roi(os.fspath(roi), image)


def _list(images: str | os.PathLike[str] | Iterable[Picture]) -> list[tuple[Picture, str]]:
    """Return the images, files by their URI, each with what changes when its bytes do."""
    if isinstance(images, str | os.PathLike):
        return list(_list_folder(os.fspath(images)))
    if pictures.is_one(images) and not isinstance(images, np.ndarray):
        raise DataError("one image was given to fit on; give a folder, or a list of images")
    # A store takes a request for each.
    return list(chain.from_iterable(storage.in_parallel(_list_picture, images)))


def _list_picture(picture: Picture) -> Sequence[tuple[Picture, str]]:
    if not isinstance(picture, str | os.PathLike):
        image = pictures.fetch(picture)
        return [(image, storage.digest(image if isinstance(image, bytes) else image.tobytes()))]
    versions = storage.file_versions(storage.absolute(os.fspath(picture)))
    if not versions:
        raise DataError(f"{picture}: no such file; check its name, and that its disk is mounted")
    return versions


def _list_folder(folder: str) -> list[tuple[str, str]]:
    uri = storage.absolute(folder)
    if {"train", "test"} & {*storage.subfolders(uri)}:
        raise DataError(f"{folder}: has folders train or test; give the folder of its good images, {folder}/train/good")
    found = [each for each in storage.file_versions(uri) if is_image(each[0].removeprefix(uri).strip("/").split("/"))]
    if not found:
        raise DataError(f"{folder}: no images (with suffix {', '.join(SUFFIXES)}); give a folder of good images")
    return found


def _free_ram() -> int:
    # A container may have less than its machine.
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(physical, int(text) if text.isdecimal() else physical) * _RAM_FRACTION)


def _free_gpu_ram(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0] * _RAM_FRACTION) if device.type == "cuda" else 0
