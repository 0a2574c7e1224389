"""Measure what a threshold from n good images finds, and how many good images it calls anomalous.

    python bench/decisions.py --data DATA --out FILE.jsonl 'student=none'

Fits preset `default`, with the name=value pairs of each choice on top, on n good images of each category, n = 10, 20,
40 and 80, chosen at random, several draws each; and sets the threshold for `--rate` in two ways: `held
out`, from a fifth of the images, which the model is not fitted on, and `folds`, from all of them. Scores the test
images, and as more good ones those training images that no model of the draw has seen. Appends a JSON line per draw to
FILE, with all scores; does not repeat a draw that FILE holds. Then prints for each n, way and rule of the threshold:
false alarms (mean over all, worst category and draw, how often more than the promise that holds with 90 %), recall, and
recall at the best threshold in hindsight at 2 % false alarms.

Rules beside the rank: `log-normal`, the upper prediction limit for one more score (Hahn and Meeker, Statistical
Intervals, section 4.8); `Pareto`, a generalised Pareto distribution fitted to the largest fifth of the scores;
`1.421 x`, that times the 95th percentile; `pooled`, the rank where there are enough images, else the largest score
plus the excess, in units of the scores' spread, that the other categories have.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from commands import integers
from local_fit import calibrate_on, change_recipe, folds_of, make_fit_parser, recall, score_features, teacher_from
from results import Results
from scipy import stats
from tabulate import tabulate

from stpm.data import mvtec
from stpm.detector import Detector
from stpm.fitting.build_memory import MemoryCandidates
from stpm.fitting.splits import Indices
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.train_student import train_student
from stpm.fitting.training_images import load_images, preprocessing_for
from stpm.method.calibration import false_alarm_bound, log_normal_limit, threshold, threshold_rank
from stpm.method.memory_bank import MemoryBank
from stpm.method.recipe import PRESETS, Recipe

_RAM_BUDGET = 4 * 2**30
# Good images that no model of a draw has seen, and defects, at most.
_MAX_FRESH, _MAX_DEFECTS = 120, 80

Array = npt.NDArray[np.float32]


class Bench:
    """A category's images, with the teacher's features of them."""

    def __init__(self, category: mvtec.Category, recipe: Recipe, most: int) -> None:
        rng = np.random.default_rng(0)
        train = [uri for uri, _ in category.train]
        preprocessing = preprocessing_for(recipe, train)
        good = [test.uri for test in category.test if test.label == mvtec.GOOD]
        defects = [test.uri for test in category.test if test.label != mvtec.GOOD]
        # Enough training images for the largest draw, with others that it has not seen.
        train, good, defects = (
            [uris[i] for i in rng.permutation(len(uris))[:count]]
            for uris, count in ((train, most + _MAX_FRESH), (good, _MAX_FRESH), (defects, _MAX_DEFECTS))
        )
        self.recipe = recipe
        images = load_images([*train, *good, *defects], preprocessing, _RAM_BUDGET)
        self.features = TeacherFeatures(teacher_from(recipe, preprocessing), images, 2 * _RAM_BUDGET, _RAM_BUDGET)
        ends = np.cumsum([len(train), len(good), len(defects)])
        self._train, self._good, self._defects = np.split(np.arange(ends[-1]), ends[:-1])

    def draw(self, count: int, number: int) -> dict[str, Any]:
        """Fit on `count` images, and score others; return the scores of each way."""
        rng = np.random.default_rng((count, number))
        order = rng.permutation(self._train)
        own = np.sort(order[:count])
        fresh = np.concatenate([self._good, order[count:]])[:_MAX_FRESH]
        found = {}
        shuffled = rng.permutation(own)
        held_out_recipe = dataclasses.replace(self.recipe, calibration_folds=0)
        held_out = np.sort(shuffled[: held_out_recipe.held_out_count(len(own))])
        train = np.setdiff1d(own, held_out)
        recipe = self.recipe.for_image_count(len(own))
        student = train_student(self.features, train, held_out, recipe, lambda epoch: None).student
        for way, images in (("held out", train), ("folds", own)):
            candidates = MemoryCandidates(self.features, images, recipe)
            detector = Detector.assemble(self.features.teacher, self.recipe, student, candidates.banks)
            parts: Iterable[tuple[Sequence[MemoryBank], Indices]] = [(candidates.banks, held_out)]
            if way == "folds":
                parts = folds_of(candidates, shuffled)
            detector, scores = calibrate_on(detector, self.features, parts, held_out)
            found[way] = {
                "calibration": scores.tolist(),
                "good": score_features(detector, self.features, fresh),
                "defects": score_features(detector, self.features, self._defects),
            }
        return {"ways": found}


def pareto(scores: Array, rate: float) -> float:
    """Return the quantile of a generalised Pareto distribution of what exceeds the 80th percentile."""
    start = float(np.quantile(scores, 0.8))
    shape, _, scale = stats.genpareto.fit(scores[scores > start] - start, floc=0)
    return start + float(stats.genpareto.ppf(1 - rate / 0.2, shape, 0, scale))


def excess(scores: Array, n: int, rate: float) -> float:
    """Return how far the quantile of many scores is above the expected largest of n, in units of their spread."""
    low, high = np.quantile(scores, [0.5, 0.9])
    largest = np.quantile(scores, n / (n + 1))
    return float((np.quantile(scores, 1 - rate) - largest) / max(high - low, 1e-6))


def thresholds(scores: Array, others: Sequence[Array], rate: float) -> dict[str, float]:
    """Return the threshold of each rule; `others` are scores of good images of other categories."""
    n = len(scores)
    largest, (low, high) = threshold(scores, rate), np.quantile(scores, [0.5, 0.9])
    beyond = np.mean([excess(each, n, rate) for each in others]) if others and (n + 1) * rate < 1 else 0.0
    return {
        "rank": largest,
        "log-normal": log_normal_limit(scores, rate),
        "Pareto": pareto(scores, rate),
        "1.421 x": 1.421 * float(np.quantile(scores, 0.95)),
        "pooled": largest + float(beyond) * float(high - low),
    }


def table(lines: Sequence[Mapping[str, Any]], rate: float) -> str:
    """Return the figures of each number of images, way and rule; the means are over categories and draws."""
    groups: dict[tuple[int, str, str], list[tuple[float, ...]]] = {}
    for line in lines:
        for way, found in line["ways"].items():
            scores, good, defects = (np.array(found[name], np.float32) for name in ("calibration", "good", "defects"))
            others = [
                np.array(other["ways"][way]["good"])
                for other in lines
                if other["settings"]["category"] != line["settings"]["category"]
                and other["settings"]["images"] == line["settings"]["images"]
            ]
            bound = false_alarm_bound(len(scores), threshold_rank(len(scores), rate))
            is_defect = np.repeat([False, True], [len(good), len(defects)])
            hindsight = recall(np.concatenate([good, defects]), is_defect)
            for rule, cut in thresholds(scores, others, rate).items():
                alarms = float((good > cut).mean())
                row = (len(scores), alarms, alarms > bound, float((defects > cut).mean()), hindsight)
                groups.setdefault((line["settings"]["images"], way, rule), []).append(row)
    rows = []
    for (images, way, rule), values in groups.items():
        count, alarms, broken, found, hindsight = np.mean(values, axis=0)
        worst = max(value[1] for value in values)
        shown = [f"{value:.3f}" for value in (alarms, worst, broken, found, hindsight)]
        rows.append([images, way, rule, f"{count:.0f}", len(values), *shown])
    head = [
        "good images",
        "calibrates on",
        "rule",
        "scores",
        "draws",
        "false alarms",
        "worst",
        "bound broken",
        "recall",
    ]
    return tabulate(rows, [*head, "in hindsight"], "pipe", disable_numparse=True)


def main() -> None:
    parser = make_fit_parser(__doc__)
    parser.add_argument("--images", type=integers, default="10,20,40,80", help="good images (default: 10,20,40,80)")
    parser.add_argument("--rate", type=float, default=0.01, help="false-alarm rate asked for (default: 0.01)")
    parser.add_argument("--draws", type=int, default=5, help="of each (default: 5)")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines; an existing one is continued")
    parser.add_argument("choices", nargs="*", default=["student=none"], help="name=value pairs on top of the preset")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = Results(arguments.out)
    base = dataclasses.replace(PRESETS["default"], teacher=arguments.teacher, teacher_weights=arguments.teacher_weights)
    names = arguments.categories or mvtec.find_categories(arguments.data)
    for choice in arguments.choices:
        lines = []
        for name in names:
            bench: list[Bench] = []

            def measure(count: int, number: int, name: str, choice: str, bench: list[Bench]) -> dict[str, Any]:
                if not bench:
                    category = mvtec.read_category(arguments.data, name)
                    bench.append(Bench(category, change_recipe(base, choice), max(arguments.images)))
                return bench[0].draw(count, number)

            for count, number in itertools.product(arguments.images, range(arguments.draws)):
                settings = {"choice": choice, "category": name, "images": count, "draw": number}
                settings |= {"teacher": arguments.teacher, "weights": arguments.teacher_weights}
                once: Callable[[], dict[str, Any]] = partial(measure, count, number, name, choice, bench)
                lines.append(results.once(settings, once))
        print(f"\n{choice}\n\n{table(lines, arguments.rate)}")


if __name__ == "__main__":
    main()
