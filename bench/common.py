"""Helpers that several benchmarks share: running and watching commands, making data, and metrics of anomaly maps."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psutil
from PIL import Image
from sklearn.metrics import roc_auc_score

from stpm import storage
from stpm.data import images, mvtec
from stpm.evaluation.category_metrics import AUPRO_LIMITS
from stpm.evaluation.pixels import Map, Mask, PixelCounts, count_pixels
from stpm.method import backbones
from stpm.method.device import resolve_precision, set_up_device
from stpm.method.forward import Matcher
from stpm.method.preprocessing import Preprocessing
from stpm.method.recipe import Recipe
from stpm.method.teacher_weights import load_teacher_weights
from stpm.options import Backend
from stpm.scoring.resuming.run_state import RunState

ROOT = Path(__file__).resolve().parents[1]
CORES = psutil.cpu_count(logical=False) or 1
# Bytes that decoded images, and features, may take in a benchmark that fits in its own process.
RAM_BUDGET = 4 * 2**30

_LEVELS = (1, 2, 3)
_MAPS_AT_ONCE = 16
_SAMPLE_SECONDS = 0.2
# Reading a process's memory is slow.
_SAMPLES_PER_MEMORY = 15


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


def options_from(values: Mapping[str, object]) -> list[str]:
    """Return `--name value` words for a command line."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


# Measurements


@dataclass(frozen=True)
class Measured:
    """One measurement: the job's value, the machine's own limit and the peer's value, in one unit."""

    name: str
    unit: str
    job: float
    limit: float
    peer: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def row(self) -> list[float]:
        """Return the three values and the two ratios, NaN without a peer."""
        peer = math.nan if self.peer is None else self.peer
        return [self.job, self.limit, peer, self.job / self.limit, self.job / peer]


def job_command(name: str, options: Mapping[str, object]) -> list[str]:
    """Return the command line of one of the jobs, to be run in ROOT."""
    return [sys.executable, f"jobs/{name}.py", *options_from(options)]


def run_job(name: str, options: Mapping[str, object]) -> None:
    """Run a job to its end. Exits if it fails."""
    ran = subprocess.run(job_command(name, options), cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(f"{name} ended with {ran.returncode}:\n{ran.stdout}{ran.stderr}")


def kill_after(
    name: str, options: Mapping[str, object], seconds: float, once: Callable[[], bool] = lambda: True
) -> None:
    """Start a job, and kill it and all its processes some seconds after something is so, as when a machine fails."""
    with subprocess.Popen(
        job_command(name, options), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as job:
        while job.poll() is None and not once():
            time.sleep(1)
        time.sleep(seconds)
        for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class ProcessTree(threading.Thread):
    """Watch a job, and all processes that this one has started, such as the nodes of a cluster, until the job ends.

    A shared page counts in equal parts for the processes that share it.

    Attributes:
        cpu_seconds: of all of them meanwhile.
        peak: largest sum of their memory, bytes.
        peaks: the same of each part of the job. `driver` is the process that was started, `ray` are Ray's own.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._driver = psutil.Process(pid)
        # A node may have computed before.
        others = [process for process in psutil.Process().children(recursive=True) if process != self._driver]
        self._before = {process: sum(process.cpu_times()[:2]) for process in others}
        self._cpu_seconds: dict[psutil.Process, float] = {}
        self.peak = 0
        self.peaks = dict.fromkeys(("driver", "scorers", "stages", "ray"), 0)

    @property
    def cpu_seconds(self) -> float:
        return sum(self._cpu_seconds.values())

    def run(self) -> None:
        for number in itertools.count():
            sizes = dict.fromkeys(self.peaks, 0)
            try:
                if self._driver.status() == psutil.STATUS_ZOMBIE:
                    return
                family = psutil.Process().children(recursive=True)
            except psutil.NoSuchProcess:
                return
            for process in family:
                with contextlib.suppress(psutil.Error):
                    self._cpu_seconds[process] = sum(process.cpu_times()[:2]) - self._before.get(process, 0.0)
                    if number % _SAMPLES_PER_MEMORY == 0:
                        sizes[self._part(process)] += process.memory_full_info().pss
            self.peak = max(self.peak, sum(sizes.values()))
            self.peaks = {part: max(peak, sizes[part]) for part, peak in self.peaks.items()}
            time.sleep(_SAMPLE_SECONDS)

    def _part(self, process: psutil.Process) -> str:
        """Return the part of the job that a process belongs to, by the title that Ray gives the process."""
        if process == self._driver:
            return "driver"
        title = " ".join(process.cmdline()[:2])
        if "MapWorker" in title:
            return "scorers"
        # Between two tasks a worker is IDLE; other titles that begin with `ray::` are Ray's own actors and agents.
        return "stages" if title.startswith(("ray::Read", "ray::Map", "ray::IDLE")) else "ray"


def time_command(command: list[str], until: str = "") -> dict[str, float]:
    """Run a command; return its wall `seconds`, and the `cpu_seconds` and `peak_mib` of its process tree.

    The peaks of a job's parts are `driver_mib` and so on. Take all of them when the command prints the line `until`, or
    at its end if that is empty. Exit if the command fails.
    """
    start = time.perf_counter()
    cost: dict[str, float] = {}
    tail: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        tree = ProcessTree(process.pid)
        tree.start()

        def measure() -> dict[str, float]:
            sizes = {"peak": tree.peak, **tree.peaks}
            seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": tree.cpu_seconds}
            return seconds | {f"{part}_mib": round(size / 2**20) for part, size in sizes.items()}

        assert process.stdout
        for line in process.stdout:
            tail = [*tail[-30:], line]
            if until and line.strip() == until:
                cost = measure()
    if process.returncode or (until and not cost):
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(tail)}")
    return cost or measure()


def append_line(path: Path, values: Mapping[str, object]) -> None:
    """Append a JSON line to a file, and print it."""
    line = json.dumps(values)
    with path.open("a") as file:
        print(line, file=file)
    print(line, flush=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def images_per_second(out: str) -> float:
    """Return the steady speed of a scoring run, or that of all of it if it was too short."""
    return RunState(out).result().steady_images_per_second


# Models and metrics


def matcher_from(recipe: Recipe, preprocessing: Preprocessing, backend: Backend = "pytorch") -> Matcher:
    """Return the recipe's teacher on this process's device."""
    device = set_up_device()
    weights = load_teacher_weights(recipe.teacher, recipe.teacher_weights, recipe.levels)
    teacher = backbones.load_backbone(recipe.teacher, recipe.levels, weights, recipe.teacher)
    return Matcher(teacher, preprocessing, device, resolve_precision(recipe.precision, device), backend)


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

    Bring masks to the maps' size by nearest neighbour, as our evaluation does.
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
    file.write_bytes(backbones.serialise(load_teacher_weights(teacher, weights, _LEVELS)))


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
