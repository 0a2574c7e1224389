"""Detection with features computed by PyTorch and by OpenVINO, for the same fitted models.

    python bench/backends.py --data DATA --precision float32

Fits preset `default` on each category by PyTorch, in one process and without Ray, then scores the test images, and the
held-out images that set the scales, with each backend. Prints image AUROC, pixel AUROC and AUPRO as a Markdown table.
"""

from __future__ import annotations

import dataclasses

import torch
from local_fit import compare, compare_real, fit, make_fit_parser, measure, teacher_from
from tabulate import tabulate

from stpm.data import mvtec
from stpm.detector import Detector
from stpm.method.recipe import PRESETS, Recipe
from stpm.options import Backend

_BACKENDS: tuple[Backend, ...] = ("pytorch", "openvino")


def run(category: mvtec.Category, recipe: Recipe) -> list[str]:
    """Fit one model, and return its metrics with each of the backends."""
    fitted = fit(category, recipe)
    found = []
    for backend in _BACKENDS:
        teacher = teacher_from(recipe, fitted.detector.teacher.preprocessing, backend)
        detector = Detector.assemble(teacher, fitted.detector.recipe, fitted.student, fitted.detector.memory)
        normal = compare(detector, [(data, None) for data in fitted.held_out])
        values = measure(compare_real(detector, category), normal, detector, "")
        found.append(" / ".join("–" if value is None else f"{value:.4f}" for value in values))
    return found


def main() -> None:
    parser = make_fit_parser(__doc__)
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = dataclasses.replace(
        PRESETS["default"],
        teacher=arguments.teacher,
        teacher_weights=arguments.teacher_weights,
        precision=arguments.precision,
    )
    rows = []
    for name in mvtec.find_categories(arguments.data, arguments.categories):
        category = mvtec.read_category(arguments.data, name)
        rows.append([name, *run(category, recipe.for_image_count(len(category.train)))])
        print(*rows[-1], flush=True)
    print(tabulate(rows, ["", "PyTorch", "OpenVINO"], tablefmt="pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
