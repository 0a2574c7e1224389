"""Detection side by side with anomalib 2.7: its STFPM, PatchCore, PaDiM and Reverse Distillation on our teacher.

    python -m venv PEER && PEER/bin/pip install 'anomalib==2.7.*'
    python bench/peer_detect.py --data DATA --peer PEER/bin/python --categories bottle,pill --seeds 0,1,2 \\
        --teacher demo --out detect.jsonl --ours 'default=--preset default' --ours 'paper=--preset paper'

Both sides have the same teacher, training images, test images, input size and cores; the peers' pixels are resized and
normalised as the teacher's were. The images that ours holds out are not given to the peers, which have no use for them.
Ours is the benchmark job, one category and seed at a time, and its report. The peers' figures are made by the same code
from their maps and scores as they are, before any normalisation.

`fit_seconds` and `predict_seconds` (per image, decoding included; ours writes heatmaps and rows too) leave out imports
and Ray's start, `process_seconds` does not. `peak_mib` is the largest sum over the process tree, a shared page divided
among those who share it. Nothing else may run on the machine while times are taken.

A JSON line per side, category and seed is appended to --out as soon as it is there; what the file holds already is not
run again. A Markdown table of means over seeds is printed at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow.parquet as pq
from peer_fit import timed
from recipes import mask_of
from sklearn.metrics import roc_auc_score
from tabulate import tabulate

from stpm import storage
from stpm.data import mvtec
from stpm.evaluation.pixels import PixelCounts, count_pixels
from stpm.fitting.train_student import split
from stpm.method import backbones as networks
from stpm.method.preprocessing import Preprocessing
from stpm.method.recipe import PRESETS
from stpm.models.store import ModelStore
from stpm.scoring.output import RunOutput
from stpm.scoring.resuming.run_state import RunState

_ROOT = Path(__file__).resolve().parents[1]
_METHODS = ("stfpm", "patchcore", "padim", "reverse_distillation")
_PEER = "anomalib "
_METRICS = ("image_auroc", "pixel_auroc", "pixel_aupro")
_COSTS = ("fit_seconds", "predict_seconds", "process_seconds", "peak_mib")
_LEVELS = (1, 2, 3)
_MAPS_AT_ONCE = 16
# PatchCore's selection takes and returns a block of its whole memory at each of thousands of steps. Where the block
# stays with the process that is twice as fast: the peer is to be at its best.
_KEEP_MEMORY = ["env", "MALLOC_MMAP_MAX_=0", f"MALLOC_TRIM_THRESHOLD_={2**32}", f"MALLOC_TOP_PAD_={2**30}"]


@dataclass(frozen=True)
class Teacher:
    """What both sides are told of the teacher: its name in our recipe, and a file of weights or ""."""

    name: str
    weights: str

    @property
    def architecture(self) -> str:
        return networks.architecture_name(self.name)

    def __str__(self) -> str:
        return f"{self.name} of {Path(self.weights).name}" if self.weights else self.name


@dataclass(frozen=True)
class PeerOptions:
    """What the peers are told besides the teacher and the images."""

    stfpm_epochs: int
    reverse_distillation_epochs: int
    coreset: float
    features: int
    threads: int

    def epochs(self, method: str) -> int:
        return self.reverse_distillation_epochs if method == "reverse_distillation" else self.stfpm_epochs

    def in_words(self, method: str) -> str:
        """What a method takes of them."""
        own = {"patchcore": f"coreset {self.coreset:g}", "padim": f"{self.features} features"}
        return own.get(method, f"{self.epochs(method)} epochs")


@dataclass(frozen=True)
class Run:
    """A line of the file: one fit and its test images. Metrics are in [0, 1], or None without masks."""

    side: str
    category: str
    seed: int
    settings: str
    height: int
    width: int
    train_count: int
    held_out_count: int
    image_auroc: float
    pixel_auroc: float | None
    pixel_aupro: float | None
    fit_seconds: float
    predict_seconds: float
    process_seconds: float
    peak_mib: float


class Runs:
    """The file of runs, to which each new one is appended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._known = [Run(**json.loads(line)) for line in lines]

    def once(self, side: str, category: str, seed: int, settings: str, make: Callable[[], Run]) -> Run:
        """The run that the file holds, or a new one."""
        for run in self._known:
            if (run.side, run.category, run.seed) == (side, category, seed):
                if run.settings != settings:
                    sys.exit(
                        f"{self._path}: {side} on {category} ran with {run.settings!r}, not with {settings!r}; "
                        "give another --out"
                    )
                return run
        made = make()
        line = json.dumps(dataclasses.asdict(made))
        with self._path.open("a") as file:
            file.write(f"{line}\n")
        print(line, flush=True)
        self._known.append(made)
        return made


def ours(label: str, options: str, settings: str, data: str, category: str, seed: int, teacher: Teacher) -> Run:
    """Fit, score and evaluate by the benchmark job."""
    with tempfile.TemporaryDirectory() as out:
        given = ["--data", data, "--categories", category, "--seeds", str(seed), "--out", out]
        given += ["--teacher", teacher.name, *(["--teacher-weights", teacher.weights] if teacher.weights else [])]
        cost = timed([sys.executable, "jobs/benchmark.py", *given, *options.split()])
        (row,) = pq.read_table(f"{out}/report.parquet").to_pylist()
        seen = ModelStore(f"{out}/models/seed-{seed}").record(category).preprocessing
        summary = RunState(RunOutput.named(out, f"seed-{seed}").state_folder).summary()
    return Run(
        label,
        category,
        seed,
        settings,
        seen.height,
        seen.width,
        row["train_count"],
        row["validation_count"],
        **{metric: row[metric] for metric in _METRICS},
        fit_seconds=round(row["fit_seconds"], 1),
        predict_seconds=round(1 / (summary.statistics.steady_images_per_second or summary.images_per_second), 4),
        process_seconds=cost["seconds"],
        peak_mib=cost["peak_mib"],
    )


def peers(
    python: str,
    method: str,
    options: PeerOptions,
    settings: str,
    category: mvtec.Category,
    teacher: Teacher,
    like: Run,
) -> Run:
    """Fit by anomalib on the images that a run of ours trained on, at its size."""
    config = networks.resolve_data_config(teacher.name)
    seen = Preprocessing(like.height, like.width, "stretch", config.interpolation, config.mean, config.std)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        weights, train, test = out / "teacher.safetensors", out / "train", out / "test"
        weights.write_bytes(networks.serialise(networks.load_teacher_weights(teacher.name, teacher.weights, _LEVELS)))
        train.mkdir()
        test.mkdir()
        for uri in training_images(category, like):
            (train / Path(uri).name).symlink_to(uri)
        for number, image in enumerate(category.test):
            (test / f"{number:05}{Path(image.uri).suffix}").symlink_to(image.uri)
        given = {
            "method": method,
            "architecture": teacher.architecture,
            "weights": weights,
            "train": train,
            "test": test,
            "out": out,
            "height": seen.height,
            "width": seen.width,
            "interpolation": seen.interpolation,
            "seed": like.seed,
            "epochs": options.epochs(method),
            "features": options.features,
            "coreset": options.coreset,
            "threads": options.threads,
        }
        command = [python, str(_ROOT / "bench" / "anomalib_detect.py")]
        command += [word for name, value in given.items() for word in (f"--{name}", str(value))]
        command += ["--mean", *map(str, seen.mean), "--std", *map(str, seen.std)]
        cost = timed([*_KEEP_MEMORY, *command] if method == "patchcore" else command)
        with np.load(out / "predictions.npz") as saved:
            shown = [category.test[int(Path(path).stem)] for path in saved["paths"]]
            image_auroc, pixel_auroc, pixel_aupro = figures(shown, saved["scores"], saved["maps"], seen)
            fit_seconds, predict_seconds = float(saved["fit_seconds"]), float(saved["predict_seconds"])
    return dataclasses.replace(
        like,
        side=f"{_PEER}{method}",
        settings=settings,
        image_auroc=image_auroc,
        pixel_auroc=pixel_auroc,
        pixel_aupro=pixel_aupro,
        fit_seconds=round(fit_seconds, 1),
        predict_seconds=round(predict_seconds, 4),
        process_seconds=cost["seconds"],
        peak_mib=cost["peak_mib"],
    )


def training_images(category: mvtec.Category, run: Run) -> list[str]:
    """URIs of the images that a run of ours trained on."""
    count = len(category.train)
    recipe = dataclasses.replace(PRESETS["paper"], seed=run.seed, validation_fraction=run.held_out_count / count)
    chosen, _ = split(count, recipe)
    if len(chosen) != run.train_count:
        sys.exit(f"{category.name}: {len(chosen)} of {count} images to train on, and {run.side} had {run.train_count}")
    return [category.train[int(number)][0] for number in chosen]


def figures(
    shown: Sequence[mvtec.TestImage],
    scores: npt.NDArray[np.float32],
    maps: npt.NDArray[np.float32],
    seen: Preprocessing,
) -> tuple[float, float | None, float | None]:
    """Image AUROC, pixel AUROC and AUPRO of test images (N), from their scores (N,) and anomaly maps (N, H, W).

    Masks are brought to the maps' size by nearest neighbour, as our evaluation does. Without any mask the two of pixels
    are None.
    """
    image_auroc = float(roc_auc_score([image.label != mvtec.GOOD for image in shown], scores))
    if not any(image.mask for image in shown):
        return image_auroc, None, None
    counts = PixelCounts.empty()
    for start in range(0, len(maps), _MAPS_AT_ONCE):
        part = slice(start, start + _MAPS_AT_ONCE)
        masks = [mask_of(image.mask, seen, (seen.height, seen.width)) for image in shown[part]]
        counts += count_pixels(maps[part], masks)
    return image_auroc, counts.auroc().value, counts.aupro(0.3).value


def why_not(method: str, teacher: Teacher, height: int, width: int) -> str:
    """Why a method cannot run, or ""."""
    if method != "reverse_distillation":
        return ""
    if not teacher.architecture.startswith(("resnet", "resnext", "wide_resnet")):
        return f"its decoder mirrors a ResNet, and the teacher is {teacher.architecture}"
    if height % 32 or width % 32:
        return f"its decoder needs sides that are multiples of 32, not {height}x{width}"
    return ""


def table(runs: Sequence[Run]) -> str:
    """Means over seeds in Markdown, by category and over all of them; the best peer of each is bold."""
    sides = list(dict.fromkeys(run.side for run in runs))
    categories = list(dict.fromkeys(run.category for run in runs))
    lines: list[list[str]] = []
    whole: dict[str, list[dict[str, float | None]]] = {side: [] for side in sides}
    for category in categories:
        of_side = {side: [run for run in runs if (run.side, run.category) == (side, category)] for side in sides}
        means = {side: _means(vars(run) for run in some) for side, some in of_side.items() if some}
        for side, values in means.items():
            whole[side].append(values)
        lines += _lines(category, means, {side: str(len(some)) for side, some in of_side.items()})
    # A mean over fewer categories than another's would not compare.
    complete = {side: _means(values) for side, values in whole.items() if len(values) == len(categories)}
    if len(categories) > 1:
        lines += _lines("**mean**", complete, dict.fromkeys(complete, ""))
    headers = ["category", "side", "seeds", *_METRICS, *_COSTS]
    align = ("left", "left", *("right",) * (len(headers) - 2))
    return str(tabulate(lines, headers, tablefmt="pipe", disable_numparse=True, colalign=align))


def _means(rows: Iterable[dict[str, float | None]]) -> dict[str, float | None]:
    """By metric and cost; None where no row has a value."""
    columns: dict[str, list[float]] = {name: [] for name in (*_METRICS, *_COSTS)}
    for row in rows:
        for name, values in columns.items():
            if (value := row[name]) is not None:
                values.append(value)
    return {name: statistics.fmean(values) if values else None for name, values in columns.items()}


def _lines(category: str, means: dict[str, dict[str, float | None]], seeds: dict[str, str]) -> list[list[str]]:
    best = {
        metric: max((v[metric] or 0.0 for side, v in means.items() if side.startswith(_PEER)), default=0.0)
        for metric in _METRICS
    }
    lines = []
    for side, values in means.items():
        cells = []
        for metric in _METRICS:
            text = "–" if values[metric] is None else f"{values[metric]:.4f}"
            cells.append(f"**{text}**" if side.startswith(_PEER) and values[metric] == best[metric] else text)
        cells += [f"{values[cost]:.4g}" for cost in _COSTS]
        lines.append([category, side, seeds[side], *cells])
    return lines


def _size(text: str) -> tuple[int, int]:
    height, width = map(int, text.lower().split("x"))
    return height, width


def _recipe(text: str) -> tuple[str, str]:
    label, separator, options = text.partition("=")
    if not separator or not label or label.startswith(_PEER):
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL=OPTIONS, such as 'default=--preset default'")
    return label, options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="local folder in the MVTec AD layout")
    parser.add_argument("--peer", required=True, help="python of the environment that has anomalib")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines, gone on with if it is there")
    parser.add_argument("--categories", default="bottle", help="separated by commas (default: bottle)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--teacher", default="demo", help="`demo`, or an architecture of timm (default: demo)")
    parser.add_argument("--teacher-weights", default="", help="its weights, a .safetensors file")
    parser.add_argument("--methods", default=",".join(_METHODS), help="the peers (default: all)")
    parser.add_argument(
        "--ours",
        type=_recipe,
        action="append",
        metavar="LABEL=OPTIONS",
        help="a recipe of ours as options of the benchmark job; may be repeated (default: 'default=--preset default')",
    )
    parser.add_argument(
        "--peer-size", type=_size, metavar="HxW", help="input of the peers (default: our first recipe's)"
    )
    parser.add_argument("--stfpm-epochs", type=int, default=15)
    parser.add_argument("--reverse-distillation-epochs", type=int, default=15)
    parser.add_argument("--coreset", type=float, default=0.1, help="share of patches that PatchCore keeps")
    parser.add_argument("--features", type=int, default=100, help="features that PaDiM draws")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1, help="of the peers")
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    if unknown := set(methods) - set(_METHODS):
        parser.error(f"--methods: no {', '.join(sorted(unknown))}; there are {', '.join(_METHODS)}")
    options = PeerOptions(
        arguments.stfpm_epochs,
        arguments.reverse_distillation_epochs,
        arguments.coreset,
        arguments.features,
        arguments.threads,
    )
    weights = storage.absolute(arguments.teacher_weights) if arguments.teacher_weights else ""
    teacher = Teacher(arguments.teacher, weights)
    data = storage.absolute(arguments.data)
    categories = [mvtec.read_category(data, name) for name in arguments.categories.split(",")]
    recipes = arguments.ours or [("default", "--preset default")]
    runs = Runs(arguments.out)
    shown: list[Run] = []
    left_out: dict[str, str] = {}
    for seed in map(int, arguments.seeds.split(",")):
        for category in categories:
            group: list[Run] = []
            for label, recipe in recipes:
                settings = f"{teacher}, {recipe}"
                fit = partial(ours, label, recipe, settings, data, category.name, seed, teacher)
                group.append(runs.once(label, category.name, seed, settings, fit))
            like = group[0]
            if arguments.peer_size:
                height, width = arguments.peer_size
                like = dataclasses.replace(like, height=height, width=width)
            for method in methods:
                if reason := why_not(method, teacher, like.height, like.width):
                    left_out[f"{method} on {category.name}"] = reason
                    continue
                settings = f"{teacher}, {like.height}x{like.width}, {options.in_words(method)}"
                fit = partial(peers, arguments.peer, method, options, settings, category, teacher, like)
                group.append(runs.once(f"{_PEER}{method}", category.name, seed, settings, fit))
            shown += group
    print(f"\n{table(shown)}")
    for what, reason in left_out.items():
        print(f"\n{_PEER}{what} is left out: {reason}.")


if __name__ == "__main__":
    main()
