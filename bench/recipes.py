"""What a recipe's choices do: validation loss and time, by which presets are chosen, and AUROCs, by which they are not.

    python bench/recipes.py --data DATA --seeds 0,1,2 'batch=8 epochs=10' 'batch=8 epochs=10 schedule=cosine'

Each choice is fitted on each category and seed, in one process and without Ray. One JSON line per fit; the AUROCs of
every way to combine levels come from the same student.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch

from stpm import images, mvtec, storage
from stpm.evaluation.metrics import auroc
from stpm.fitting.features import TeacherFeatures
from stpm.fitting.held_out import calibrate_student
from stpm.fitting.loop import fit, split
from stpm.fitting.task import load_pixels
from stpm.forward import Matcher, pick_device, place, resolve_precision
from stpm.matching import Combine
from stpm.networks import architecture_of, load_teacher, trunk_from
from stpm.recipe import PRESETS, Recipe

_BUDGET = 4 * 2**30
_BATCH = 16


def chosen(base: Recipe, text: str) -> Recipe:
    """A recipe with `name=value` pairs replaced, values as JSON or plain words."""
    changes: dict[str, Any] = {}
    for pair in text.split():
        name, value = pair.split("=", 1)
        changes[name] = value if isinstance(getattr(base, name), str) else json.loads(value)
    return dataclasses.replace(base, **changes)


def run(category: mvtec.Category, recipe: Recipe) -> dict[str, Any]:
    """Fit one student and score the category's test images."""
    device = pick_device()
    architecture = architecture_of(recipe.teacher)
    weights = load_teacher(recipe.teacher, recipe.teacher_weights, recipe.levels)
    teacher = trunk_from(architecture, recipe.levels, weights, recipe.teacher)
    matcher = Matcher(teacher, recipe, device, resolve_precision(recipe.precision, device))
    start = time.perf_counter()
    pixels = load_pixels([uri for uri, _ in category.train], recipe.view, _BUDGET)
    train, held_out = split(len(pixels), recipe.validation_share, recipe.seed)
    fitted = fit(TeacherFeatures(matcher, pixels, _BUDGET), train, held_out, recipe, lambda epoch: None)
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {
        "validation_loss": round(fitted.kept.validation_loss, 5),
        "train_loss": round(fitted.kept.train_loss, 5),
        "seconds": round(seconds, 1),
    }
    student = place(trunk_from(architecture, recipe.levels, fitted.student, "student"), device)
    test = load_pixels([image.uri for image in category.test], recipe.view, _BUDGET)
    parts = [matcher.distances(student, test[i : i + _BATCH]) for i in range(0, len(test), _BATCH)]
    distances = [torch.cat(level) for level in zip(*parts, strict=True)]
    labels = np.array([image.label != mvtec.GOOD for image in category.test])
    truth = np.stack([_mask(image.mask, recipe.view) for image in category.test])
    for combine in get_args(Combine):
        variant = dataclasses.replace(recipe, combine=combine)
        combiner = Matcher(teacher, variant, device, matcher.precision)
        _, statistics = calibrate_student(fitted.student, combiner, pixels, held_out, variant)
        maps = combiner.anomaly_maps(distances, statistics)
        result[combine] = [round(auroc(labels, maps.max(axis=(1, 2))), 4), round(auroc(truth, maps), 4)]
    return result


def _mask(uri: str, view: images.View) -> npt.NDArray[np.bool_]:
    if not uri:
        return np.zeros((view.size, view.size), bool)
    return images.resize_mask(images.decode_mask(storage.read(uri)), view)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="data set in the MVTec AD layout, with masks")
    parser.add_argument("--seeds", default="0", help="seeds, separated by commas (default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("choices", nargs="+", help="name=value pairs on top of preset paper and teacher demo")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = dataclasses.replace(PRESETS["paper"], teacher="demo")
    for text in arguments.choices:
        for seed in map(int, arguments.seeds.split(",")):
            for name in mvtec.find_categories(arguments.data):
                recipe = dataclasses.replace(chosen(base, text), seed=seed)
                result = run(mvtec.read_category(arguments.data, name), recipe)
                print(json.dumps({"choices": text, "category": name, "seed": seed} | result), flush=True)


if __name__ == "__main__":
    main()
