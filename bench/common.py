"""Helpers that several benchmarks share: running and watching commands, making data, and metrics of anomaly maps."""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import psutil
from PIL import Image
from sklearn.metrics import roc_auc_score

from stpm import storage
from stpm.data import images, mvtec
from stpm.evaluation.category_metrics import AUPRO_LIMITS
from stpm.evaluation.pixels import PixelCounts, count_pixels
from stpm.method import backbones
from stpm.method.forward import Matcher, pick_device, resolve_precision
from stpm.method.fusion import Map
from stpm.method.preprocessing import Preprocessing
from stpm.method.recipe import Recipe
from stpm.options import WantedBackend

ROOT = Path(__file__).resolve().parents[1]
CORES = psutil.cpu_count(logical=False) or 1
# Bytes that decoded images, and features, may take in a benchmark that fits in its own process.
MEMORY_BUDGET = 4 * 2**30

_LEVELS = (1, 2, 3)
_MAPS_AT_ONCE = 16
_SAMPLE_SECONDS = 3.0
_PROGRESS = re.compile(r"^(\d+)/(\d+) images")
_JOB_PARTS = ("driver", "scorers", "stages", "ray")

Mask = npt.NDArray[np.bool_]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help shows a module's docstring as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


# Data


def make_image(seed: int, height: int, width: int, file_format: str = "PNG") -> bytes:
    """Return an image file of grey noise."""
    pixels = np.random.default_rng(seed).integers(90, 130, (height, width, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, file_format)
    return sink.getvalue()


def tiny_recipe(size: int) -> list[str]:
    """Return options of the fit job for a student so small that its own time does not count."""
    options = {
        "preset": "paper",
        "teacher": "test_resnet",
        "teacher-weights": "random",
        "size": size,
        "batch-size": 4,
        "epochs": 1,
    }
    return options_from(options)


def add_backend_option(parser: argparse.ArgumentParser) -> None:
    """Add `--backend`, to be resolved by `resolve_backend`."""
    parser.add_argument(
        "--backend",
        choices=get_args(WantedBackend),
        default="auto",
        help="what computes our features; auto: openvino where it is installed (default: auto)",
    )


def options_from(values: Mapping[str, object]) -> list[str]:
    """Return `--name value` words for a command line."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


# Commands


def job_command(name: str, options: Mapping[str, object]) -> list[str]:
    """Return the command line of one of the four jobs, to be run in ROOT."""
    return [sys.executable, f"jobs/{name}.py", *options_from(options)]


def memory_bytes(process: psutil.Process) -> int:
    """Return a process's proportional set size (a shared page counts in parts), or 0 if the process has ended."""
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


class PeakMemory(threading.Thread):
    """Sample the memory of a process and its descendants; `peak` is the largest sum, in bytes."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root = psutil.Process(pid)
        self.peak = 0

    def run(self) -> None:
        while self._root.is_running() and self._root.status() != psutil.STATUS_ZOMBIE:
            try:
                family = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self.peak = max(self.peak, sum(map(memory_bytes, family)))
            time.sleep(_SAMPLE_SECONDS)


def time_command(command: list[str], until: str = "") -> dict[str, float]:
    """Run a command and return its wall time (`seconds`) and the peak memory of its process tree (`peak_mib`).

    Both are taken when the command prints the line `until`, or at its end if that is empty. Exits if the command fails.
    """
    start = time.perf_counter()
    seconds = 0.0
    peak = 0
    tail: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        memory = PeakMemory(process.pid)
        memory.start()
        assert process.stdout
        for line in process.stdout:
            tail = [*tail[-30:], line]
            if until and line.strip() == until:
                seconds, peak = time.perf_counter() - start, memory.peak
    if process.returncode or (until and not seconds):
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(tail)}")
    seconds = seconds or time.perf_counter() - start
    return {"seconds": round(seconds, 1), "peak_mib": round((peak or memory.peak) / 2**20)}


class Sample(NamedTuple):
    """The state of a running score job: seconds since its start, images done, and MiB by part of the job."""

    seconds: float
    images: int
    memory: dict[str, float]


def watch_score_job(options: Mapping[str, object]) -> list[Sample]:
    """Run the score job to its end and return samples of it. Exits if the job fails."""
    command = job_command("score", options)
    start = sampled = time.perf_counter()
    samples: list[Sample] = []
    lines: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            lines.append(line)
            if (match := _PROGRESS.match(line)) and time.perf_counter() - sampled >= _SAMPLE_SECONDS:
                sampled = time.perf_counter()
                samples.append(Sample(sampled - start, int(match[1]), _memory_by_part(process.pid)))
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(lines[-30:])}")
    return samples


def by_quarter(samples: Sequence[Sample], count: int) -> Iterator[dict[str, float]]:
    """Yield images per second and mean memory for each quarter of `count` images."""
    for quarter in range(4):
        inside = [s for s in samples if quarter * count < 4 * s.images <= (quarter + 1) * count]
        if len(inside) > 1:
            speed = (inside[-1].images - inside[0].images) / (inside[-1].seconds - inside[0].seconds)
            memory = {part: round(fmean(s.memory.get(part, 0) for s in inside)) for part in _JOB_PARTS}
            yield {"quarter": quarter + 1, "images_per_second": round(speed, 1), **memory}


def _memory_by_part(driver: int) -> dict[str, float]:
    sizes: dict[str, float] = defaultdict(float)
    root = psutil.Process(driver)
    for process in [root, *root.children(recursive=True)]:
        try:
            title = " ".join(process.cmdline()[:2])
        except psutil.Error:
            continue
        part = "driver" if process.pid == driver else _part_from_title(title)
        sizes[part] += memory_bytes(process) / 2**20
    return dict(sizes)


def _part_from_title(title: str) -> str:
    """Return the part of the job that a process belongs to, by the title that Ray gives the process."""
    if "MapWorker" in title:
        return "scorers"
    # Between two tasks a worker is IDLE; other titles that begin with `ray::` are Ray's own actors and agents.
    return "stages" if title.startswith(("ray::Read", "ray::Map", "ray::IDLE")) else "ray"


# Models and metrics


def matcher_from(recipe: Recipe, preprocessing: Preprocessing) -> Matcher:
    """Return the recipe's teacher on this process's device, computed by PyTorch."""
    device = pick_device()
    weights = backbones.load_teacher_weights(recipe.teacher, recipe.teacher_weights, recipe.levels)
    teacher = backbones.load_backbone(recipe.teacher, recipe.levels, weights, recipe.teacher)
    return Matcher(teacher, preprocessing, device, resolve_precision(recipe.precision, device))


def read_mask(uri: str) -> Mask | None:
    """Return a test image's ground truth at its own resolution, or None if there is no URI."""
    return images.decode_mask(storage.read(uri)) if uri else None


class MapMetrics(NamedTuple):
    """Metrics of test images, in [0, 1]; those of pixels are None without masks."""

    image_auroc: float
    pixel_auroc: float | None
    pixel_aupro: float | None


METRICS = MapMetrics._fields


def map_metrics(
    tests: Sequence[mvtec.TestImage], scores: Sequence[float], maps: Sequence[Map], preprocessing: Preprocessing
) -> MapMetrics:
    """Return the metrics of test images from their scores and anomaly maps.

    Masks are brought to the maps' size by nearest neighbour, as our evaluation does.
    """
    image_auroc = float(roc_auc_score([test.label != mvtec.GOOD for test in tests], scores))
    if not any(test.mask for test in tests):
        return MapMetrics(image_auroc, None, None)
    counts = PixelCounts.empty()
    for start in range(0, len(maps), _MAPS_AT_ONCE):
        batch = maps[start : start + _MAPS_AT_ONCE]
        masks = []
        for test, each in zip(tests[start : start + _MAPS_AT_ONCE], batch, strict=True):
            mask = read_mask(test.mask)
            masks.append(np.zeros(each.shape, bool) if mask is None else images.resize_mask(mask, preprocessing))
        counts += count_pixels(batch, masks)
    aupro = counts.aupro(AUPRO_LIMITS["pixel_aupro"]).value
    return MapMetrics(image_auroc, counts.auroc().value, aupro)


# anomalib


@dataclass(frozen=True)
class AnomalibFit:
    """The result of one of anomalib's models: seconds and peak of the process, and its output for each test image."""

    cost: dict[str, float]
    tests: list[mvtec.TestImage]
    scores: npt.NDArray[np.float32]
    maps: npt.NDArray[np.float32]
    fit_seconds: float
    predict_seconds: float


def write_teacher(teacher: str, weights: str, file: Path) -> None:
    """Write the weights of the teacher's backbone as safetensors, for `anomalib_side.py`."""
    file.write_bytes(backbones.serialise(backbones.load_teacher_weights(teacher, weights, _LEVELS)))


def fit_anomalib(
    python: str,
    folder: Path,
    teacher: tuple[str, str],
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
        teacher: its name in our recipe, and a file of weights or "".
        train: paths of the training images.
        tests: test images.
        options: further options of `anomalib_side.py fit`.
        until: line at which time and memory are taken; "": the end.
        prefix: words before the command, such as `env`.
    """
    paths = {"weights": folder / "teacher.safetensors", "train": folder / "train", "test": folder / "test"}
    write_teacher(*teacher, paths["weights"])
    for name in ("train", "test"):
        paths[name].mkdir()
    for uri in train:
        (paths["train"] / Path(uri).name).symlink_to(uri)
    for number, test in enumerate(tests):
        (paths["test"] / f"{number:05}{Path(test.uri).suffix}").symlink_to(test.uri)
    values = {"architecture": backbones.architecture_name(teacher[0]), **paths, "out": folder, **options}
    command = [*prefix, python, str(ROOT / "bench" / "anomalib_side.py"), "fit", *options_from(values)]
    cost = time_command(command, until)
    with np.load(folder / "predictions.npz") as saved:
        shown = [tests[int(Path(path).stem)] for path in saved["paths"]]
        seconds = float(saved["fit_seconds"]), float(saved["predict_seconds"])
        return AnomalibFit(cost, shown, saved["scores"], saved["maps"], *seconds)
