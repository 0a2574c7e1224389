"""Compare choices of a recipe on several products, and choose for each product by the others' metrics.

    python bench/recipes.py --data DATA --seeds 0,1,2 --out FILE.jsonl 'pixels=65536' 'epochs=10' \\
        --variants '' 'memory=0' 'student=none' 'top_fraction=0'

Each choice is a change to preset `default`, fitted once per category and seed, in one process and without Ray. A
variant changes how the parts of that fit are fused, or drops parts: it needs no fit of its own. Appends a JSON line per
fit to FILE: seconds, validation loss, and for each variant image AUROC, pixel AUROC, AUPRO, and the recall at 2 % false
alarms in hindsight. `real` are the test images. Other kinds of defects are drawn on held-out good images, see
bench/drawn.py, and need no label. A fit that FILE holds with the same options is not
repeated. Then prints two tables of the fits of this call: the means over seeds, and for each category the metrics of
the choice that is best on all others.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from commands import integers, words
from drawn import KINDS as DRAWN
from drawn import draw_defects
from local_fit import change_recipe, compare, compare_real, fit, make_fit_parser, measure
from metrics import METRICS
from results import Results
from tabulate import tabulate

from stpm import storage
from stpm.data import mvtec
from stpm.method.recipe import PRESETS, Recipe

_KINDS = ("real", *DRAWN)
# METRICS, and the recall.
_MEASURED = len(METRICS) + 1
# What a variant may change of a recipe: what is used after the fit.
_VARIED = {"student", "memory", "fusion", "student_weight", "smoothing", "top_fraction", "coarse_weight"}


def run(category: mvtec.Category, recipe: Recipe, variants: Sequence[str], kinds: Sequence[str]) -> dict[str, Any]:
    """Fit one model, and measure each variant of it on the category's test images and on drawn defects."""
    fitted = fit(category, recipe)
    detector, held = fitted.detector, fitted.held_out
    recipe = detector.recipe
    normal = compare(detector, [(data, None) for data in held])
    measured = {}
    if "real" in kinds:
        measured["real"] = compare_real(detector, category), normal
    if drawn := [kind for kind in kinds if kind in DRAWN]:
        # One half sets the scales, defects are drawn on the other: no image sets its own scale.
        half = compare(detector, [(data, None) for data in held[::2]])
        measured |= {kind: (compare(detector, draw_defects(held[1::2], kind)), half) for kind in drawn}
    return {
        "size": detector.teacher.preprocessing.size_text,
        "seconds": round(fitted.seconds, 1),
        "validation_loss": fitted.validation_loss and round(fitted.validation_loss, 5),
        "variants": {
            variant: {kind: measure(*compared, detector, variant) for kind, compared in measured.items()}
            for variant in variants
        },
    }


def tables(lines: Sequence[Mapping[str, Any]], kind: str) -> str:
    """Return means over seeds of each choice and variant, and per category the result of the best on the others."""
    categories = sorted({line["settings"]["category"] for line in lines})
    by_choice: dict[str, dict[str, list[list[float | None]]]] = {}
    for line in lines:
        choice, category = line["settings"]["choice"], line["settings"]["category"]
        for variant, metrics in line["variants"].items():
            name = " ".join(filter(None, (choice, variant))) or "default"
            by_choice.setdefault(name, {}).setdefault(category, []).append(metrics[kind])

    def mean(name: str, category: str, metric: int) -> float | None:
        values = [value for pair in by_choice[name][category] if (value := pair[metric]) is not None]
        return statistics.fmean(values) if values else None

    def average(name: str, metric: int, but: str = "") -> float:
        values = [value for c in categories if c != but and (value := mean(name, c, metric)) is not None]
        return statistics.fmean(values) if values else math.nan

    def shown(name: str, category: str) -> str:
        return " / ".join("–" if (v := mean(name, category, m)) is None else f"{v:.4f}" for m in range(_MEASURED))

    rows = []
    for name in by_choice:
        means = " / ".join(f"{average(name, m):.4f}" for m in range(_MEASURED))
        rows.append([name, *(shown(name, category) for category in categories), means])
    text = tabulate(rows, [kind, *categories, "mean"], tablefmt="pipe", disable_numparse=True)
    if len(categories) == 1:
        return text
    chosen = {c: max(by_choice, key=lambda name: average(name, 0, but=c)) for c in categories}
    rows = [[c, chosen[c], shown(chosen[c], c)] for c in categories]
    headers = ["left out", "best on the others", kind]
    return f"{text}\n\n{tabulate(rows, headers, tablefmt='pipe', disable_numparse=True)}"


def main() -> None:
    parser = make_fit_parser(__doc__)
    parser.add_argument("--seeds", type=integers, default="0", help="seeds, separated by commas (default: 0)")
    parser.add_argument(
        "--kinds",
        type=words,
        default="real,drawn",
        help=f"of {', '.join(_KINDS)} (default: real,drawn)",
    )
    parser.add_argument("--train-images", type=int, help="fit on the first N images alone", metavar="N")
    parser.add_argument("--variants", nargs="*", default=[""], help="name=value pairs on top of each choice")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines; an existing one is continued")
    parser.add_argument("choices", nargs="*", default=[""], help="name=value pairs on top of preset default")
    arguments = parser.parse_args()
    if unknown := set(arguments.kinds) - set(_KINDS):
        parser.error(f"--kinds: no {', '.join(sorted(unknown))}; there are {', '.join(_KINDS)}")
    if needs_fit := {pair.split("=")[0] for variant in arguments.variants for pair in variant.split()} - _VARIED:
        parser.error(f"--variants: {', '.join(sorted(needs_fit))} needs a fit of its own, as one of the choices")
    torch.set_num_threads(arguments.threads)
    common = {
        "data": storage.absolute(arguments.data),
        "teacher": arguments.teacher,
        "teacher_weights": arguments.teacher_weights,
        "train_images": arguments.train_images,
        "threads": arguments.threads,
        "kinds": sorted(arguments.kinds),
        "variants": sorted(arguments.variants),
    }
    results = Results(arguments.out)
    lines = []
    base = dataclasses.replace(PRESETS["default"], teacher=arguments.teacher, teacher_weights=arguments.teacher_weights)
    names = mvtec.find_categories(arguments.data, arguments.categories)
    for seed, choice, name in itertools.product(arguments.seeds, arguments.choices, names):
        category = mvtec.read_category(arguments.data, name)
        category = dataclasses.replace(category, train=category.train[: arguments.train_images])
        recipe = dataclasses.replace(change_recipe(base, choice), seed=seed).for_image_count(len(category.train))
        settings = {"choice": choice, "category": name, "seed": seed} | common
        lines.append(results.once(settings, partial(run, category, recipe, arguments.variants, arguments.kinds)))
    for kind in arguments.kinds:
        print("\n" + tables(lines, kind))


if __name__ == "__main__":
    main()
