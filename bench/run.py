"""Measure how far fit and score are from the machine's own limit, and from anomalib 2.7: ratios of one run.

    python -m venv PEER && PEER/bin/pip install 'anomalib[openvino]==2.7.*'
    python bench/run.py score fit first growth --data DATA --category bottle --peer PEER/bin/python

| section | job | limit | peer |
|---|---|---|---|
| score | steady images/s of the score job | a loop over its stages' functions | `Engine.predict`; its OpenVINO export |
| fit | seconds of the fit job | the same fit in one process, without Ray | `Engine.fit`, with the same images |
| first | seconds until --help is shown, or ten images are scored | bare imports, or the bare loop | |
| together | seconds of two, and of three fits at once | as many times the seconds of one | |
| growth | ms per further image, or per category | that of the first further images, or of the fits themselves | |

Both sides have the packaged teacher and all cores. Seconds are those of whole processes, imports and Ray's start
included; the loop of `score` runs in one process of one thread per core, its best arrangement on a CPU, once warm, and
anomalib's prediction is timed without its imports. Both sides write pictures. In `fit`, preset `paper` has the epochs,
batch size and images of anomalib's own recipe, and `default` runs as it comes; one code computes the metrics from both
sides' anomaly maps. `growth` scores tiny images with a tiny student, so that everything else is measured, and divides
the seconds that each number of images takes more than the last by the difference of the numbers; RAY_ADDRESS or --nodes
chooses a cluster. Memory is the largest sum over processes, a shared page divided among those that share it.

Prints the machine, a JSON line per measurement, and the medians over --repeats as a table. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import pyarrow as pa
import torch
from anomalib_peer import Teacher, fit_anomalib, predict_speeds
from commands import CORES, job_command, make_parser, time_command
from growth import measure_growth
from local_fit import make_task, run_task
from measured import Measured
from metrics import map_metrics
from tabulate import tabulate

import stpm
from stpm import storage
from stpm.cluster.device import keep_freed_memory
from stpm.data import mvtec
from stpm.fitting.splits import split_images
from stpm.method.arithmetic import Arithmetic, choose_arithmetic, cpu_capabilities
from stpm.method.backbones import DEMO_TEACHER
from stpm.method.preprocessing import IMAGENET, Preprocessing
from stpm.method.recipe import PRESETS, Recipe, WantedPrecision
from stpm.models.store import ModelStore
from stpm.options import Size, WantedBackend
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.manifest import labelled_rows, write_manifest
from stpm.scoring.inputs.sources import image_rows
from stpm.scoring.options import OutputOptions, ScoreOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.run_state import RunState
from stpm.scoring.stages.decode import Decode
from stpm.scoring.stages.draw_heatmaps import DrawHeatmaps
from stpm.scoring.stages.scorer import Scorer

T = TypeVar("T")

# Recipes of the models that score: as slow as any other model, but soon fitted.
_DEFAULT = dataclasses.replace(
    PRESETS["default"], teacher=DEMO_TEACHER, size=Size("256"), epochs=2, warmup_epochs=0, min_steps=0
)
_SCORED_MODELS = {
    "student": dataclasses.replace(PRESETS["paper"], teacher=DEMO_TEACHER, epochs=1),
    "memory": dataclasses.replace(_DEFAULT, student="none"),
    "default": _DEFAULT,
}
_LOOP_BATCH = 16
_WARM_BATCHES = 3
_KERNEL_BATCHES = 30
_PEER_IMAGES = 500
_PEER_TEACHER = Teacher(DEMO_TEACHER)
_FIRST_IMAGES = 10
_SMALL_TRAIN = 24
_VECTOR_FLAGS = ("avx", "amx", "asimd", "sve")
# anomalib's own preprocessing.
_PEER_PREPROCESSING = Preprocessing(256, 256, "stretch", IMAGENET.interpolation, IMAGENET.mean, IMAGENET.std)


@dataclass(frozen=True)
class Bench:
    """What to measure, and an empty folder for everything that is written."""

    folder: Path
    arguments: argparse.Namespace
    category: mvtec.Category
    arithmetic: Arithmetic
    seed: int

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

    def fit(self, recipe: Recipe) -> tuple[Path, float]:
        """Fit the category (if small, a part of it) in one process, without Ray; return store and seconds."""
        folder, train = self.new_folder(), self.category.train[: _SMALL_TRAIN if self.arguments.small else None]
        category = dataclasses.replace(self.category, train=train)
        task = make_task(ModelStore(str(folder)), category, recipe)
        start = time.perf_counter()
        in_processes(run_task, [(task, self.arithmetic.backend)])
        return folder, time.perf_counter() - start

    def images(self, count: int) -> Path:
        """Link to the category's test images in turn, under new names, until there are `count`."""
        folder = self.folder / f"images-{count}"
        if not folder.exists():
            folder.mkdir()
            for i in range(count):
                uri = self.category.test[i % len(self.category.test)].uri
                (folder / f"{i:06}{Path(uri).suffix}").symlink_to(uri)
        return folder

    def score(self, models: Path, images: Path) -> tuple[dict[str, float], float]:
        """Run the score job with heatmaps and overlays; return its cost, and its steady images per second."""
        out = self.new_folder() / "out"
        options = {"models": models, "images": images, "out": out, "category": self.category.name, "top": 0}
        cost = time_command([*job_command("score", options | {"backend": self.arithmetic.backend}), "--overlay"])
        return cost, RunState(str(out)).result().steady_images_per_second


def in_processes(function: Callable[..., T], tasks: Sequence[tuple[Any, ...]]) -> list[T]:
    """Call a function for each tuple of arguments, in processes that keep freed memory, as those of the jobs do."""
    with multiprocessing.get_context("spawn").Pool(len(tasks), keep_freed_memory) as pool:
        return pool.starmap(function, tasks)


# score


def measure_score(bench: Bench) -> Iterator[Measured]:
    """Score the category's images with each kind of model."""
    images = bench.images(bench.arguments.images)
    peer = exported = None
    if bench.arguments.peer:
        images_of_peer = bench.images(_PEER_IMAGES)
        peer, exported = predict_speeds(bench.arguments.peer, bench.new_folder(), _PEER_TEACHER, images_of_peer)
    for name, recipe in list(_SCORED_MODELS.items())[: 1 if bench.arguments.small else None]:
        models, _ = bench.fit(dataclasses.replace(recipe, precision=bench.arguments.precision))
        limit, limit_cpu = loop_speed(bench, models, images, CORES)
        cost, steady = bench.score(models, images)
        yield Measured(name, "images/s", steady, limit, peer, cost)
        if exported:
            yield Measured(f"{name} (peer: OpenVINO)", "images/s", steady, limit, exported)
        kernels = sum(in_processes(run_kernels, [(str(models), bench.category.name, bench.arithmetic)] * CORES))
        yield Measured(f"{name}: loop (limit: kernels)", "images/s", limit, kernels)
        yield Measured(
            name, "images per CPU second", *(bench.arguments.images / s for s in (cost["cpu_seconds"], limit_cpu))
        )


def loop_speed(bench: Bench, models: Path, images: Path, processes: int) -> tuple[float, float]:
    """Run the bare loop in several processes; return its images per second, and their CPU seconds."""
    out = bench.new_folder()
    folder = str(out / "manifest")
    manifest = write_manifest(image_rows([str(images)], CategoryRule(bench.category.name)), folder)
    rows = pa.concat_tables(
        storage.read_table(uri) for segment in manifest.segments(folder) for uri, *_ in segment.shards
    )
    length = -(-rows.num_rows // processes)
    tasks = [
        (str(models), rows.slice(i * length, length), str(out), bench.category.name, bench.arithmetic)
        for i in range(processes)
    ]
    speeds, cpu_seconds = zip(*in_processes(run_loop, tasks), strict=True)
    return sum(speeds), sum(cpu_seconds)


def run_loop(models: str, rows: pa.Table, out: str, category: str, arithmetic: Arithmetic) -> tuple[float, float]:
    """Decode, score and write in this process, on one thread.

    Returns:
        Images per second, once warm; and CPU seconds of this process, imports included.
    """
    torch.set_num_threads(1)
    store, output = ModelStore(models), OutputOptions(overlay=True)
    record = store.record(category)
    preprocessing = {category: record.preprocessing}
    decode = Decode(preprocessing, fetchers=1)
    scorer = Scorer(store, {category: record}, ScoreOptions(scoring_batch_size=_LOOP_BATCH), output, arithmetic)
    write = DrawHeatmaps(RunOutput.single(out), output, preprocessing)
    batches = [rows.slice(i, _LOOP_BATCH) for i in range(0, rows.num_rows, _LOOP_BATCH)]
    for batch in batches[:_WARM_BATCHES]:
        write(scorer(decode(batch)))
    start = time.perf_counter()
    for batch in batches:
        write(scorer(decode(batch)))
    return rows.num_rows / (time.perf_counter() - start), time.process_time()


def run_kernels(models: str, category: str, arithmetic: Arithmetic) -> float:
    """Compute features alone in this process, on one thread: the images per second of teacher and student."""
    torch.set_num_threads(1)
    detector = stpm.load(models, category, backend=arithmetic.backend)
    teacher = detector.teacher
    with torch.inference_mode():
        inputs = teacher.inputs(torch.zeros(_LOOP_BATCH, *teacher.preprocessing.input_shape, 3, dtype=torch.uint8))
        for batch in range(_WARM_BATCHES + _KERNEL_BATCHES):
            if batch == _WARM_BATCHES:
                start = time.perf_counter()
            teacher(inputs)
            if detector.student:
                teacher.compute(detector.student, inputs[-1])
    return _KERNEL_BATCHES * _LOOP_BATCH / (time.perf_counter() - start)


# fit


def measure_fit(bench: Bench) -> Iterator[Measured]:
    """Fit the category by presets `paper` and `default`."""
    peer = fit_by_peer(bench) if bench.arguments.peer else {}
    paper = dataclasses.replace(PRESETS["paper"], epochs=bench.arguments.epochs)
    for preset, recipe in {"paper": paper, "default": PRESETS["default"]}.items():
        models = bench.new_folder()
        options = {"data": bench.arguments.data, "categories": bench.category.name, "models": models, "preset": preset}
        options |= {"teacher": DEMO_TEACHER, "epochs": recipe.epochs, "seed": bench.seed}
        options |= {"backend": bench.arithmetic.backend}
        cost = time_command(job_command("fit", options))
        _, limit = bench.fit(dataclasses.replace(recipe, teacher=DEMO_TEACHER, seed=bench.seed))
        details = cost | measure_model(bench, models) | {f"peer_{key}": value for key, value in peer.items()}
        yield Measured(preset, "s", cost["seconds"], limit, peer.get("seconds"), details)
        steps = training_seconds(ModelStore(str(models)), bench.category.name)
        yield Measured(f"{preset}: training steps alone", "s", steps, limit, peer.get("seconds"))


def training_seconds(store: ModelStore, category: str) -> float:
    """Return the seconds in which a student computed its features and gradients, and changed its weights."""
    record = store.record(category)
    speeds = store.history(record)["images_per_second"].to_numpy()
    return float((record.fit.train_count / speeds).sum())


def measure_model(bench: Bench, models: Path) -> dict[str, float | None]:
    """Return metrics of a model of ours on the category's test images, by the stages of the score job."""
    store, name = ModelStore(str(models)), bench.category.name
    record = store.record(name)
    preprocessing = record.preprocessing
    scorer = Scorer(store, {name: record}, ScoreOptions(), OutputOptions(raw_maps=True), bench.arithmetic)
    rows = scorer(Decode({name: preprocessing})(pa.concat_tables(labelled_rows([bench.category]))))
    scored = rows.to_pylist()
    shapes = [preprocessing.content_shape(row["width"], row["height"]) for row in scored]
    maps = [np.frombuffer(row["anomaly_map"], np.float32).reshape(s) for row, s in zip(scored, shapes, strict=True)]
    return map_metrics(bench.category.test, [row["score"] for row in scored], maps, preprocessing)._asdict()


def fit_by_peer(bench: Bench) -> dict[str, Any]:
    """Return cost and metrics of anomalib's fit on the images that our recipe trains on."""
    train = bench.category.train
    chosen, _ = split_images(np.arange(len(train)), dataclasses.replace(PRESETS["paper"], seed=bench.seed))
    uris = [train[number][0] for number in chosen.tolist()]
    options = {"seed": bench.seed, "epochs": bench.arguments.epochs, "threads": CORES}
    fitted = fit_anomalib(
        bench.arguments.peer, bench.new_folder(), _PEER_TEACHER, uris, bench.category.test, options, until="fitted"
    )
    scores = [each.max() for each in fitted.maps]
    metrics = map_metrics(fitted.tests, scores, list(fitted.maps), _PEER_PREPROCESSING)
    return fitted.cost | metrics._asdict()


# first


def measure_first(bench: Bench) -> Iterator[Measured]:
    """Show the help, and score ten images."""
    imports = [sys.executable, "-c", "import argparse, numpy, yaml"]
    job, limit = (time_command(command)["seconds"] for command in ([*job_command("score", {}), "--help"], imports))
    yield Measured("--help", "s", job, limit)
    if not bench.arguments.small:
        images = bench.images(_FIRST_IMAGES)
        models, _ = bench.fit(_SCORED_MODELS["student"])
        cost, _ = bench.score(models, images)
        start = time.perf_counter()
        loop_speed(bench, models, images, processes=1)
        yield Measured("ten images", "s", cost["seconds"], time.perf_counter() - start)


# together


def measure_together(bench: Bench) -> Iterator[Measured]:
    """Fit the category several times at once, each time in a process with a thread for every core."""
    recipe = dataclasses.replace(_DEFAULT, min_steps=80)
    category = dataclasses.replace(bench.category, train=bench.category.train[:100])

    def seconds(count: int) -> float:
        tasks = [make_task(ModelStore(str(bench.new_folder())), category, recipe) for _ in range(count)]
        start = time.perf_counter()
        in_processes(run_task, [(task, bench.arithmetic.backend) for task in tasks])
        return time.perf_counter() - start

    alone = seconds(1)
    for count in (2, 3):
        yield Measured(f"{count} fits at once", "s", seconds(count), count * alone)


SECTIONS: dict[str, Callable[[Bench], Iterator[Measured]]] = {
    "score": measure_score,
    "fit": measure_fit,
    "first": measure_first,
    "together": measure_together,
    "growth": lambda bench: measure_growth(
        bench.new_folder(), bench.arguments.image_counts, bench.arguments.category_counts, bench.arguments.nodes
    ),
}


def describe_machine() -> dict[str, Any]:
    """Return the CPU's name, cores and vector extensions, and the versions of what computes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    values = {name.strip(): value.strip() for name, value in lines.items()}
    flags = [flag for flag in values.get("flags", values.get("Features", "")).split() if flag.startswith(_VECTOR_FLAGS)]
    return {
        "cpu": values.get("model name", platform.machine()),
        "cores": CORES,
        "flags": " ".join(flags),
        "versions": {name: version(name) for name in ("torch", "ray")},
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("sections", nargs="+", choices=SECTIONS)
    parser.add_argument("--data", required=True, help="local folder in the MVTec AD layout, with masks")
    parser.add_argument("--category", default="bottle")
    parser.add_argument("--peer", default="", help="python of the environment that has anomalib")
    parser.add_argument("--backend", choices=get_args(WantedBackend), default="auto", help="what computes our features")
    parser.add_argument("--precision", choices=get_args(WantedPrecision), default="auto", help="of `score`'s models")
    parser.add_argument("--repeats", type=int, default=3, help="runs, with seeds 0, 1, 2 (default: 3)")
    parser.add_argument("--epochs", type=int, default=15, help="of anomalib and of preset paper (default: 15)")
    parser.add_argument("--images", type=int, default=6000, help="images of `score` (default: 6000)")
    parser.add_argument("--image-counts", type=int, nargs="+", default=[10_000, 40_000, 100_000], help="of `growth`")
    parser.add_argument("--category-counts", type=int, nargs="+", default=[1, 15, 200], help="of `growth`")
    parser.add_argument("--nodes", type=int, default=0, help="nodes of a local cluster for `growth` (default: none)")
    parser.add_argument("--small", action="store_true", help="fit few images, one model, no jobs in `first`: for CI")
    arguments = parser.parse_args()
    arguments.data = storage.absolute(arguments.data)
    arithmetic = choose_arithmetic([cpu_capabilities()], arguments.backend)
    print(json.dumps(describe_machine() | dataclasses.asdict(arithmetic)), flush=True)
    category = mvtec.read_category(arguments.data, arguments.category)
    found: dict[tuple[str, str, str], list[list[float]]] = {}
    for seed in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), arguments, category, arithmetic, seed)
            for section in arguments.sections:
                for measured in SECTIONS[section](bench):
                    print(json.dumps({"section": section} | dataclasses.asdict(measured)), flush=True)
                    found.setdefault((section, measured.name, measured.unit), []).append(measured.row())
    rows = [[*key, *map(statistics.median, zip(*values, strict=True))] for key, values in found.items()]
    headers = ["section", "measure", "unit", "job", "limit", "peer", "of limit", "of peer"]
    print("\n" + tabulate(rows, headers, tablefmt="github", floatfmt=".4g"))


if __name__ == "__main__":
    main()
