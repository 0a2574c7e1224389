"""Measure what each speed-up of fitting gains: images per second of training with all of them, and without each.

    python bench/fit_speed.py --data DATA --category bottle

One run each, in a process of its own, without Ray; PyTorch computes the teacher's features. Prints a Markdown table;
`seconds` is the time of a 15-epoch fit, computed from the first epoch, the steady ones and the preparation. Run nothing
else on the machine meanwhile.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from common import MEMORY_BUDGET, make_parser, matcher_from
from tabulate import tabulate

from stpm import storage
from stpm.cluster.connection import KEEP_FREED_MEMORY
from stpm.data import images, mvtec
from stpm.fitting import train_student as training
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.train_student import split, train_student
from stpm.fitting.training_images import load_images, preprocessing_for
from stpm.method.backbones import Backbone
from stpm.method.forward import to_device
from stpm.method.preprocessing import Preprocessing
from stpm.method.recipe import PRESETS, Recipe

_EPOCHS_MEASURED = 4
_EPOCHS_OF_A_FIT = 15

ToDevice = Callable[[Backbone, torch.device], Backbone]


@dataclass(frozen=True)
class Speed:
    """Seconds of the preparation, of the first epoch and of each later one; training images per epoch."""

    before: float
    first: float
    steady: float
    images: int

    def row(self, name: str, best: Speed | None) -> list[str]:
        whole = self.before + self.first + self.steady * (_EPOCHS_OF_A_FIT - 1)
        ratio = "" if best is None else f"{best.steady / self.steady:.2f}"
        return [name, f"{self.images / self.steady:.1f}", ratio, f"{whole:.0f}"]


def measure(
    uris: list[str],
    recipe: Recipe,
    threads: int,
    *,
    keep_features: bool = True,
    decode_once: bool = True,
    keep_memory: bool = True,
    to_device_by: ToDevice = to_device,
) -> Speed:
    """Time one short fit, in a process of its own."""
    for name, value in KEEP_FREED_MEMORY["env_vars"].items():
        if keep_memory:
            os.environ[name] = value
        else:
            os.environ.pop(name, None)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (uris, recipe, threads, keep_features, decode_once, to_device_by))


def _measure(
    uris: list[str], recipe: Recipe, threads: int, keep_features: bool, decode_once: bool, to_device_by: ToDevice
) -> Speed:
    torch.set_num_threads(threads)
    preprocessing = preprocessing_for(recipe, uris)
    matcher = matcher_from(recipe, preprocessing)
    start = time.perf_counter()
    loaded = load_images(uris, preprocessing, MEMORY_BUDGET)
    decoding = time.perf_counter() - start
    features = TeacherFeatures(matcher, loaded, MEMORY_BUDGET if keep_features else 0)
    before = time.perf_counter() - start
    train, held_out = split(len(loaded), recipe)
    ends = [time.perf_counter()]
    with patch.object(training, "to_device", to_device_by):
        train_student(features, train, held_out, recipe, lambda epoch: ends.append(time.perf_counter()))
    first, *later = np.diff(ends).tolist()
    again = 0.0 if decode_once else decoding
    return Speed(before, first + again, statistics.median(later) + again, len(train))


def contiguous(backbone: Backbone, device: torch.device) -> Backbone:
    backbone.register_forward_pre_hook(lambda module, arguments: (arguments[0].contiguous(),))
    return backbone.to(device=device, memory_format=torch.contiguous_format)  # type: ignore[call-overload, no-any-return]


def compiled(backbone: Backbone, device: torch.device) -> Backbone:
    backbone = to_device(backbone, device)
    backbone.net.compile()
    return backbone


def one_by_one(uris: list[str], preprocessing: Preprocessing) -> float:
    """Return images per second of decoding without parallel readers."""
    start = time.perf_counter()
    for uri in uris:
        images.decode(storage.read(uri), preprocessing)
    return len(uris) / (time.perf_counter() - start)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", required=True, help="data set in the MVTec AD layout")
    parser.add_argument("--category", default="bottle")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    arguments = parser.parse_args()
    recipe = dataclasses.replace(PRESETS["paper"], teacher="demo", epochs=_EPOCHS_MEASURED)
    category = mvtec.read_category(storage.absolute(arguments.data), arguments.category)
    uris, threads = [uri for uri, _ in category.train], arguments.threads
    best = measure(uris, recipe, threads)
    rows = [best.row("all", None)]
    float32 = dataclasses.replace(recipe, precision="float32")
    for name, speed in (
        ("memory given back to the kernel", measure(uris, recipe, threads, keep_memory=False)),
        ("in float32", measure(uris, float32, threads)),
        ("teacher's features computed anew", measure(uris, recipe, threads, keep_features=False)),
        ("channels first", measure(uris, recipe, threads, to_device_by=contiguous)),
        ("images decoded anew in each epoch", measure(uris, recipe, threads, decode_once=False)),
        ("one thread", measure(uris, recipe, 1)),
        ("torch.compile added", measure(uris, recipe, threads, to_device_by=compiled)),
    ):
        rows.append(speed.row(name, best))
    print(tabulate(rows, ["measure", "images/s", "of all", "seconds"], tablefmt="github", disable_numparse=True))
    preprocessing = preprocessing_for(recipe, uris)
    start = time.perf_counter()
    load_images(uris, preprocessing, MEMORY_BUDGET)
    parallel = len(uris) / (time.perf_counter() - start)
    print(f"\ndecoding: {parallel:.0f} images/s in parallel, {one_by_one(uris, preprocessing):.0f} one by one")


if __name__ == "__main__":
    main()
