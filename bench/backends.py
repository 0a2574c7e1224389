"""Detection with features computed by PyTorch and by OpenVINO, for the same fitted models.

    python bench/backends.py --data DATA --precision float32

Fits preset `default` on each category by PyTorch, in one process and without Ray, then scores the test images, and the
held-out images that set the scales, with each backend. Prints image AUROC, pixel AUROC and AUPRO as a Markdown table.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from common import RAM_BUDGET, make_parser, matcher_from, read_mask
from recipes import compare, measure
from tabulate import tabulate

from stpm import storage
from stpm.data import mvtec
from stpm.fitting.build_memory import build_memory
from stpm.fitting.calibrate import make_parts
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.train_student import split_images, train_student
from stpm.fitting.training_images import load_images, preprocessing_for
from stpm.method.recipe import PRESETS, Recipe
from stpm.options import Backend

_BACKENDS: tuple[Backend, ...] = ("eager", "openvino")


def run(category: mvtec.Category, recipe: Recipe) -> list[str]:
    """Fit one model, and return its metrics with each of the backends."""
    uris = [uri for uri, _ in category.train]
    preprocessing = preprocessing_for(recipe, uris)
    good = load_images(uris, preprocessing, RAM_BUDGET)
    features = TeacherFeatures(matcher_from(recipe, preprocessing), good, RAM_BUDGET)
    train, held_out = split_images(len(good), recipe)
    memory = build_memory(features, train, recipe)
    student = train_student(features, train, held_out, recipe, lambda epoch: None).student
    held = [(storage.read(uris[i]), None) for i in held_out]
    tests = [(storage.read(image.uri), read_mask(image.mask)) for image in category.test]
    is_defect = np.array([image.label != mvtec.GOOD for image in category.test])
    found = []
    for backend in _BACKENDS:
        matcher = matcher_from(recipe, preprocessing, backend)
        parts = matcher.compile(make_parts(student, memory, recipe, matcher.device))
        scored = dataclasses.replace(compare(parts, matcher, tests), is_defect=is_defect)
        values = measure(scored, compare(parts, matcher, held), matcher, recipe, "")
        found.append(" / ".join("–" if value is None else f"{value:.4f}" for value in values))
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", required=True, help="data set in the MVTec AD layout")
    parser.add_argument("--categories", default="", help="separated by commas (default: all)")
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--teacher-weights", default="", help="file of weights, as for the fit job")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = dataclasses.replace(
        PRESETS["default"],
        teacher=arguments.teacher,
        teacher_weights=arguments.teacher_weights,
        precision=arguments.precision,
    )
    rows = []
    for name in mvtec.find_categories(arguments.data, [name for name in arguments.categories.split(",") if name]):
        category = mvtec.read_category(arguments.data, name)
        rows.append([name, *run(category, recipe.for_image_count(len(category.train)))])
        print(*rows[-1], flush=True)
    print(tabulate(rows, ["", "PyTorch", "OpenVINO"], tablefmt="pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
