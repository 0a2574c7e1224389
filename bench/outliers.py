"""Mix real defects into the good images of products, and count how many of them a fit would name first.

    python bench/outliers.py --data DATA

Prints, for 1, 5 and 10 % of test defects among the good training images, the share of them that is in the first places,
as many places as there are defects / twice as many, by the distance to the k-th nearest image in the coarsest level of
the coarse view, as in a fit, and of the fine view. Then how many defects, and how many good images, lie far out in the
coarse view. Means over draws of the defects.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from local_fit import make_fit_parser, teacher_from
from tabulate import tabulate
from torch import Tensor

from stpm.data import mvtec
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.training_images import load_images, preprocessing_for
from stpm.method.memory_bank import DescriptorSpec
from stpm.method.outliers import lies_far, neighbour_distances, score_images
from stpm.method.recipe import PRESETS, Recipe

_RAM_BUDGET = 4 * 2**30
_SHARES = (0.01, 0.05, 0.1)
_MAX_POSITIONS = 64
_DRAWS = 2


def describe(uris: Sequence[str], good: Sequence[str], recipe: Recipe) -> list[Tensor]:
    """Return the descriptors of images, (N, P, C), in the coarsest levels of the coarse and of the fine view."""
    preprocessing = preprocessing_for(recipe, good)
    images = load_images(uris, preprocessing, _RAM_BUDGET)
    features = TeacherFeatures(teacher_from(recipe, preprocessing), images, _RAM_BUDGET, _RAM_BUDGET)
    described = []
    for index in (len(features.shapes) - 1, len(features.teacher.views[0].levels) - 1):
        stride = math.ceil(math.sqrt(math.prod(features.shapes[index]) / _MAX_POSITIONS))
        spec = DescriptorSpec(index, "features", stride, stride)
        batches = features.batches(np.arange(len(images)))
        described.append(torch.cat([spec.describe(features(batch)[index]).flatten(1, 2) for batch in batches]))
    return described


def count(described: Tensor, good: int, share: float, seed: int) -> list[float]:
    """Return the shares of mixed-in defects in the first places, and how many defects and good images lie far out."""
    wanted = min(max(round(share * good), 1), len(described) - good)
    defects = good + np.random.default_rng(seed).choice(len(described) - good, wanted, replace=False)
    mixed = torch.from_numpy(np.concatenate([np.arange(good), defects]))
    scores = score_images(
        neighbour_distances(described[mixed], torch.ones(len(mixed), described.shape[1], dtype=torch.bool), seed)
    )
    is_defect = scores.argsort(descending=True) >= good
    far = lies_far(scores)
    found = [float(is_defect[: places * wanted].sum()) / wanted for places in (1, 2)]
    return [*found, float(far[good:].sum()), float(far[:good].sum()), wanted]


def main() -> None:
    arguments = make_fit_parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    teacher = {"teacher": arguments.teacher, "teacher_weights": arguments.teacher_weights}
    recipe = dataclasses.replace(PRESETS["default"], student="none", **teacher)
    rows = []
    for name in mvtec.find_categories(arguments.data, arguments.categories):
        category = mvtec.read_category(arguments.data, name)
        good = [uri for uri, _ in category.train]
        defects = [test.uri for test in category.test if test.label != mvtec.GOOD]
        views = describe([*good, *defects], good, recipe)
        for share in _SHARES:
            coarse, fine = (
                np.mean([count(view, len(good), share, seed) for seed in range(_DRAWS)], axis=0) for view in views
            )
            places = [f"{first:.2f} / {twice:.2f}" for first, twice, *_ in (coarse, fine)]
            far = f"{coarse[2]:.1f} of {coarse[4]:.0f}, {coarse[3]:.1f} of {len(good)}"
            rows.append([name, f"{share:.0%}", *places, far])
            print(*rows[-1], flush=True)
    print(tabulate(rows, ["product", "defects", "coarse view", "fine view", "far out: defects, good"], "pipe"))


if __name__ == "__main__":
    main()
