"""Run anomalib's models by `anomalib_side.py`, in an environment of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from commands import ROOT, options_from, time_command

from stpm.data import mvtec
from stpm.method import backbones
from stpm.method.teacher_weights import load_teacher_weights

_SCRIPT = str(ROOT / "bench" / "anomalib_side.py")
_LEVELS = (1, 2, 3)


class Teacher(NamedTuple):
    """The teacher of both sides: its name in our recipe, and a file of weights or ""."""

    teacher: str
    teacher_weights: str = ""


@dataclass(frozen=True)
class AnomalibFit:
    """The result of one of anomalib's models.

    Args:
        cost: what `time_command` measures of the process.
        tests: the N test images, in the order of scores and maps.
        scores: (N,), before any normalisation.
        maps: (N, H, W), before any normalisation.
        fit_seconds: of the fit alone.
        predict_seconds: per test image.
    """

    cost: dict[str, float]
    tests: list[mvtec.TestImage]
    scores: npt.NDArray[np.float32]
    maps: npt.NDArray[np.float32]
    fit_seconds: float
    predict_seconds: float


def fit_anomalib(
    python: str,
    folder: Path,
    teacher: Teacher,
    train: Sequence[str],
    tests: Sequence[mvtec.TestImage],
    options: Mapping[str, object],
    until: str = "",
    prefix: Sequence[str] = (),
) -> AnomalibFit:
    """Fit one of anomalib's models and predict, in anomalib's environment.

    Args:
        python: interpreter of that environment.
        folder: empty, for everything that is written.
        teacher: of the model.
        train: paths of the training images.
        tests: test images.
        options: further options of `anomalib_side.py fit`.
        until: line at which time and memory are taken; "": the end.
        prefix: words before the command, such as `env`.
    """
    train_folder, test_folder = folder / "train", folder / "test"
    for new in (train_folder, test_folder):
        new.mkdir()
    for uri in train:
        (train_folder / Path(uri).name).symlink_to(uri)
    for number, test in enumerate(tests):
        (test_folder / f"{number:05}{Path(test.uri).suffix}").symlink_to(test.uri)
    paths = {"train": train_folder, "test": test_folder, "out": folder}
    values = {**_teacher_options(teacher, folder), **paths, **options}
    cost = time_command([*prefix, python, _SCRIPT, "fit", *options_from(values)], until)
    with np.load(folder / "predictions.npz") as saved:
        shown = [tests[int(Path(path).stem)] for path in saved["paths"]]
        seconds = float(saved["fit_seconds"]), float(saved["predict_seconds"])
        return AnomalibFit(cost, shown, saved["scores"], saved["maps"], *seconds)


def predict_speeds(python: str, folder: Path, teacher: Teacher, images: Path) -> tuple[float, float]:
    """Return the images per second of anomalib's prediction, pictures written, for a folder of images.

    By `Engine.predict`, and exported to OpenVINO.
    """
    values = _teacher_options(teacher, folder) | {"images": images, "out": folder / "anomalib"}
    command = [python, _SCRIPT, "predict", *options_from(values)]
    ran = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    engine, exported = map(float, ran.stdout.splitlines()[-1].split())
    return engine, exported


def _teacher_options(teacher: Teacher, folder: Path) -> dict[str, object]:
    """Write the teacher's weights to a folder; return the options that name it."""
    file = folder / "teacher.safetensors"
    file.write_bytes(backbones.serialise(load_teacher_weights(*teacher, _LEVELS)))
    return {"architecture": backbones.architecture_name(teacher.teacher), "weights": file}
