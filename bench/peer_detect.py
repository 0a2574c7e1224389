"""Detection side by side with anomalib 2.7: its STFPM, PatchCore, PaDiM and Reverse Distillation on our teacher.

    python -m venv PEER && PEER/bin/pip install 'anomalib==2.7.*'
    python bench/peer_detect.py --data DATA --peer PEER/bin/python --categories bottle,pill --seeds 0,1,2 \\
        --teacher demo --out detect.jsonl --ours 'default=--preset default' --ours 'paper=--preset paper'

Both sides have the same teacher, training images, test images, input size and cores; anomalib's input is resized and
normalised as the teacher's was. The images that our recipe holds out are not given to anomalib, which has no use for
them. Our side is the benchmark job, one category and seed at a time, and its report. One code computes the metrics of
the other side from anomalib's maps and scores before any normalisation.

`fit_seconds` and `predict_seconds` (per image, decoding included; ours writes heatmaps and rows too) leave out imports
and Ray's start; `process_seconds` includes them. `peak_mib` is the largest sum over the process tree, a shared page
divided among the processes that share it. Run nothing else on the machine while times are taken.

Appends a JSON line per side, category and seed to --out, and does not repeat those that the file holds with the same
options. At the end, prints a Markdown table of means over the seeds of this call.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from anomalib_peer import Teacher, fit_anomalib
from commands import CORES, integers, job_command, make_parser, time_command, words
from metrics import METRICS, map_metrics
from results import Results
from tabulate import tabulate

from stpm import storage
from stpm.data import mvtec
from stpm.fitting.splits import split_images
from stpm.method.backbones import architecture_name, resolve_data_config
from stpm.method.preprocessing import Preprocessing
from stpm.method.recipe import PRESETS
from stpm.models.store import ModelStore
from stpm.scoring.output import RunOutput
from stpm.scoring.run_state import RunState

_METHODS = ("stfpm", "patchcore", "padim", "reverse_distillation")
_PEER = "anomalib "
_COSTS = ("fit_seconds", "predict_seconds", "process_seconds", "peak_mib")
# PatchCore's selection takes and returns a block of its whole memory at each of thousands of steps. It is twice as fast
# if the process keeps the block.
_KEEP_MEMORY = ["env", "MALLOC_MMAP_MAX_=0", f"MALLOC_TRIM_THRESHOLD_={2**32}", f"MALLOC_TOP_PAD_={2**30}"]


@dataclass(frozen=True)
class Run:
    """What one side did with a category and seed. Metrics are in [0, 1], or None without masks."""

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


def run_ours(options: str, data: str, category: str, seed: int, teacher: Teacher) -> Run:
    """Fit, score and evaluate by the benchmark job."""
    with tempfile.TemporaryDirectory() as out:
        given = {"data": data, "categories": category, "seeds": seed, "out": out, "teacher": teacher.teacher}
        given |= {"teacher-weights": teacher.teacher_weights} if teacher.teacher_weights else {}
        cost = time_command([*job_command("benchmark", given), *options.split()])
        (row,) = storage.read_table(f"{out}/report.parquet").to_pylist()
        preprocessing = ModelStore(f"{out}/models/seed-{seed}").record(category).preprocessing
        result = RunState(RunOutput.named(out, f"seed-{seed}").state_folder).result()
    return Run(
        preprocessing.height,
        preprocessing.width,
        row["train_count"],
        row["held_out_count"],
        **{metric: row[metric] for metric in METRICS},
        fit_seconds=round(row["fit_seconds"], 1),
        predict_seconds=round(1 / result.steady_images_per_second, 4),
        process_seconds=cost["seconds"],
        peak_mib=cost["peak_mib"],
    )


def run_anomalib(
    arguments: argparse.Namespace, method: str, category: mvtec.Category, seed: int, teacher: Teacher, ours: Run
) -> Run:
    """Fit by anomalib on the images that a run of ours trained on, at its size."""
    config = resolve_data_config(teacher.teacher)
    preprocessing = Preprocessing(ours.height, ours.width, "stretch", config.interpolation, config.mean, config.std)
    options = {
        "method": method,
        "height": ours.height,
        "width": ours.width,
        "interpolation": config.interpolation,
        "mean": ",".join(map(str, config.mean)),
        "std": ",".join(map(str, config.std)),
        "seed": seed,
        "epochs": epochs_for(arguments, method),
        "features": arguments.features,
        "coreset": arguments.coreset,
        "threads": arguments.threads,
    }
    train = training_images(category, seed, ours)
    prefix = _KEEP_MEMORY if method == "patchcore" else ()
    with tempfile.TemporaryDirectory() as folder:
        fitted = fit_anomalib(arguments.peer, Path(folder), teacher, train, category.test, options, prefix=prefix)
    metrics = map_metrics(fitted.tests, fitted.scores.tolist(), list(fitted.maps), preprocessing)
    return dataclasses.replace(
        ours,
        **metrics._asdict(),
        fit_seconds=round(fitted.fit_seconds, 1),
        predict_seconds=round(fitted.predict_seconds, 4),
        process_seconds=fitted.cost["seconds"],
        peak_mib=fitted.cost["peak_mib"],
    )


def epochs_for(arguments: argparse.Namespace, method: str) -> int:
    """Return the epochs of a method; those without a network to train take no notice."""
    epochs: int = getattr(arguments, f"{method}_epochs", arguments.stfpm_epochs)
    return epochs


def anomalib_settings(arguments: argparse.Namespace, method: str, ours: Run) -> dict[str, Any]:
    """Return what a method's run depends on, beside data and teacher."""
    own = {"patchcore": {"coreset": arguments.coreset}, "padim": {"features": arguments.features}}
    return {
        "size": f"{ours.height}x{ours.width}",
        "train_count": ours.train_count,
        "threads": arguments.threads,
        **own.get(method, {"epochs": epochs_for(arguments, method)}),
    }


def training_images(category: mvtec.Category, seed: int, ours: Run) -> list[str]:
    """Return the URIs of the images that a run of ours trained on."""
    count = len(category.train)
    recipe = dataclasses.replace(PRESETS["paper"], seed=seed, held_out_fraction=ours.held_out_count / count)
    chosen, _ = split_images(np.arange(count), recipe)
    if len(chosen) != ours.train_count:
        sys.exit(f"{category.name}: {len(chosen)} of {count} images to train on, and our side had {ours.train_count}")
    return [category.train[int(number)][0] for number in chosen]


def reason_to_skip(method: str, teacher: Teacher, height: int, width: int) -> str:
    """Return why a method cannot run, or ""."""
    if method != "reverse_distillation":
        return ""
    architecture = architecture_name(teacher.teacher)
    if not architecture.startswith(("resnet", "resnext", "wide_resnet")):
        return f"its decoder mirrors a ResNet, and the teacher is {architecture}"
    if height % 32 or width % 32:
        return f"its decoder needs sides that are multiples of 32, not {height}x{width}"
    return ""


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return means over seeds in Markdown, by category and over all categories."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["settings"]["category"], line["settings"]["side"]), []).append(line)
    means = {key: _means(some) for key, some in groups.items()}
    rows = [[*key, len(groups[key]), *values.values()] for key, values in means.items()]
    categories = {category for category, _ in groups}
    for side in dict.fromkeys(side for _, side in groups):
        values = [means[category, side] for category in categories if (category, side) in means]
        # A mean over fewer categories does not compare with the others.
        if 1 < len(categories) == len(values):
            rows.append(["**mean**", side, None, *_means(values).values()])
    headers = ["category", "side", "seeds", *METRICS, *_COSTS]
    formats = ["", "", "", *(".4f" for _ in METRICS), *(".4g" for _ in _COSTS)]
    return str(tabulate(rows, headers, tablefmt="pipe", floatfmt=formats, missingval="–"))


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the mean of each metric and cost; None where no row has a value."""
    found = {name: [v for row in rows if (v := row[name]) is not None] for name in (*METRICS, *_COSTS)}
    return {name: statistics.fmean(values) if values else None for name, values in found.items()}


def _size(text: str) -> tuple[int, int]:
    height, width = map(int, text.lower().split("x"))
    return height, width


def _recipe(text: str) -> tuple[str, str]:
    label, separator, options = text.partition("=")
    if not separator or not label or label.startswith(_PEER):
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL=OPTIONS, such as 'default=--preset default'")
    return label, options


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", required=True, help="local folder in the MVTec AD layout")
    parser.add_argument("--peer", required=True, help="python of the environment that has anomalib")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines; an existing one is continued")
    parser.add_argument("--categories", type=words, default="bottle", help="separated by commas (default: bottle)")
    parser.add_argument("--seeds", type=integers, default="0,1,2")
    parser.add_argument("--teacher", default="demo", help="`demo`, or an architecture of timm (default: demo)")
    parser.add_argument("--teacher-weights", default="", help="its weights, a .safetensors file")
    parser.add_argument("--methods", type=words, default=",".join(_METHODS), help="anomalib's models (default: all)")
    parser.add_argument(
        "--ours",
        type=_recipe,
        action="append",
        metavar="LABEL=OPTIONS",
        help="a recipe of ours as options of the benchmark job; may be repeated (default: 'default=--preset default')",
    )
    parser.add_argument(
        "--peer-size", type=_size, metavar="HxW", help="input of anomalib (default: our first recipe's)"
    )
    parser.add_argument("--stfpm-epochs", type=int, default=15)
    parser.add_argument("--reverse-distillation-epochs", type=int, default=15)
    parser.add_argument("--coreset", type=float, default=0.1, help="fraction of patches that PatchCore keeps")
    parser.add_argument("--features", type=int, default=100, help="features that PaDiM draws")
    parser.add_argument("--threads", type=int, default=CORES, help="threads of anomalib")
    arguments = parser.parse_args()
    methods = arguments.methods
    if unknown := set(methods) - set(_METHODS):
        parser.error(f"--methods: no {', '.join(sorted(unknown))}; there are {', '.join(_METHODS)}")
    weights = storage.absolute(arguments.teacher_weights) if arguments.teacher_weights else ""
    teacher = Teacher(arguments.teacher, weights)
    data = storage.absolute(arguments.data)
    categories = [mvtec.read_category(data, name) for name in arguments.categories]
    recipes = arguments.ours or [("default", "--preset default")]
    results = Results(arguments.out)
    lines: list[dict[str, Any]] = []

    def once(side: str, category: str, seed: int, own: Mapping[str, Any], fit: Callable[[], Run]) -> Run:
        settings = {"side": side, "category": category, "seed": seed, "data": data, **teacher._asdict(), **own}
        line = results.once(settings, lambda: dataclasses.asdict(fit()))
        lines.append(line)
        return Run(**{field.name: line[field.name] for field in dataclasses.fields(Run)})

    skipped: dict[str, str] = {}
    for seed, category in itertools.product(arguments.seeds, categories):
        ours = []
        for label, options in recipes:
            fit = partial(run_ours, options, data, category.name, seed, teacher)
            ours.append(once(label, category.name, seed, {"options": options}, fit))
        like = ours[0]
        if arguments.peer_size:
            height, width = arguments.peer_size
            like = dataclasses.replace(like, height=height, width=width)
        for method in methods:
            if reason := reason_to_skip(method, teacher, like.height, like.width):
                skipped[f"{method} on {category.name}"] = reason
                continue
            settings = anomalib_settings(arguments, method, like)
            fit = partial(run_anomalib, arguments, method, category, seed, teacher, like)
            once(f"{_PEER}{method}", category.name, seed, settings, fit)
    print(f"\n{table(lines)}")
    for name, reason in skipped.items():
        print(f"\n{_PEER}{name} is skipped: {reason}.")


if __name__ == "__main__":
    main()
