"""Decisions that flip where another backend, or another precision, scores a model than the one that calibrated it.

    python bench/backends.py --data DATA --seeds 0,1 --out FILE.jsonl 'student=none memory=300 pixels=65536'

Fits preset `default`, with these changes, for each category and seed in each way to compute features: PyTorch and
OpenVINO, in float32 and in bfloat16. Then scores the test images in each way, and compares with the threshold that the
fit has calibrated. Appends a JSON line per fit to FILE, and does not repeat those that it holds. Prints a table: for
each way that calibrates (rows) and each that scores (columns) the test images whose decision is another than where the
same way did both, and the median and the largest change of a score, relative to the threshold; in the last column what
another seed changes.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from commands import integers
from local_fit import change_recipe, compare, make_fit_parser, make_task, run_task
from results import Results
from tabulate import tabulate

from stpm import storage
from stpm.data import mvtec
from stpm.detector import Detector
from stpm.method.calibration import threshold
from stpm.method.recipe import PRESETS, Precision, Recipe
from stpm.method.teacher import Teacher
from stpm.method.views import choose_views, levels_of_teacher
from stpm.models.store import Model, ModelStore
from stpm.options import Backend

_WAYS: dict[str, tuple[Backend, Precision]] = {
    "PyTorch float32": ("pytorch", "float32"),
    "PyTorch bfloat16": ("pytorch", "bfloat16"),
    "OpenVINO float32": ("openvino", "float32"),
    "OpenVINO bfloat16": ("openvino", "bfloat16"),
}
_BATCH = 16

Scores = npt.NDArray[np.float64]


def run(category: mvtec.Category, recipe: Recipe, way: str) -> dict[str, Any]:
    """Fit one model in one way; return its calibration, and the scores of the test images in each way."""
    backend, precision = _WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        store = ModelStore(folder)
        run_task(make_task(store, category, dataclasses.replace(recipe, precision=precision)), backend)
        model = store.load(category.name)
        return {
            "calibration": model.calibration.scores.tolist(),
            "scores": {other: score(store, model, category, other) for other in _WAYS},
        }


def score(store: ModelStore, model: Model, category: mvtec.Category, way: str) -> list[float]:
    """Score the test images in one way."""
    backend, precision = _WAYS[way]
    record = model.record
    recipe, preprocessing = record.recipe, record.preprocessing
    backbone = store.load_teacher(recipe.teacher, levels_of_teacher(recipe), record.teacher_digest)
    views = choose_views(recipe, preprocessing)
    teacher = Teacher(backbone, preprocessing, torch.device("cpu"), precision, backend, views)
    detector = Detector.from_model(model, teacher)
    scores = []
    for start in range(0, len(category.test), _BATCH):
        files = [(storage.read(image.uri), None) for image in category.test[start : start + _BATCH]]
        compared = compare(detector, files)
        maps = detector.anomaly_maps(compared.distances, compared.content)
        scores += [score for part in maps for score in part.scalars(recipe.top_fraction)[:, 2].tolist()]
    return scores


def table(lines: Sequence[Mapping[str, Any]], rate: float) -> str:
    """Write the table of all fits, which have two seeds or more."""

    def relative(line: Mapping[str, Any], way: str) -> Scores:
        """Return the scores in one way, relative to the threshold: above 1 is anomalous."""
        return np.array(line["scores"][way]) / threshold(np.array(line["calibration"]), rate)

    rows = []
    for way in _WAYS:
        fits = [line for line in lines if line["settings"]["way"] == way]
        seeds = [
            (relative(one, way), relative(other, way))
            for one, other in itertools.combinations(fits, 2)
            if one["settings"]["category"] == other["settings"]["category"]
        ]
        cells = [_changes([(relative(line, way), relative(line, other)) for line in fits]) for other in _WAYS]
        rows.append([way, *cells, _changes(seeds)])
    return tabulate(rows, ["", *_WAYS, "another seed"], tablefmt="pipe", disable_numparse=True)


def _changes(pairs: Sequence[tuple[Scores, Scores]]) -> str:
    before, after = (np.concatenate(side) for side in zip(*pairs, strict=True))
    changes = np.abs(after - before)
    flips = np.count_nonzero((before > 1) != (after > 1))
    return f"{flips} of {len(before)}; {np.median(changes):.2%}, {changes.max():.0%}"


def main() -> None:
    parser = make_fit_parser(__doc__)
    parser.add_argument("--seeds", type=integers, default="0,1", help="two or more, separated by commas (default: 0,1)")
    parser.add_argument("--false-alarm-rate", type=float, default=0.01, help="for the thresholds (default: 0.01)")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines; an existing one is continued")
    parser.add_argument("choice", nargs="?", default="", help="name=value pairs on top of preset default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = dataclasses.replace(PRESETS["default"], teacher=arguments.teacher, teacher_weights=arguments.teacher_weights)
    results = Results(arguments.out)
    lines = []
    for name in mvtec.find_categories(arguments.data, arguments.categories):
        category = mvtec.read_category(storage.absolute(arguments.data), name)
        for seed, way in itertools.product(arguments.seeds, _WAYS):
            recipe = dataclasses.replace(change_recipe(base, arguments.choice), seed=seed)
            settings = {"choice": arguments.choice, "category": name, "seed": seed, "way": way}
            settings |= {"teacher": arguments.teacher}
            lines.append(results.once(settings, partial(run, category, recipe, way)))
    print(table(lines, arguments.false_alarm_rate))


if __name__ == "__main__":
    main()
