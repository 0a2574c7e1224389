"""Mix real defects into the good images of products; count how many of them a fit would name, and what that repairs.

    python bench/outliers.py --data DATA --recipe 'pixels=40960 coarse_pixels=0 brightness=0 memory=1000'

Fits preset `default` without a student, with these name=value pairs on top, with 1, 5 and 10 % of test defects among
the good training images. Prints the share of the defects that is in the first places, as many places as there are
defects / twice as many: by the distance to the nearest other images, by the score from banks without the image's fold,
and by the more unusual of both, as on `fit.html`; and how many defects, and how many good images, are far out. Means
over draws of the defects.

Then, for one draw, image AUROC, and recall and false alarms at the threshold for one percent, on the test images but
those that were mixed in: of that model, of one without the defects that a person has excluded among the first images,
as many as `fit.html` shows, and of one on the good images alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from local_fit import change_recipe, folds_of, make_fit_parser, score_features, teacher_from
from sklearn.metrics import roc_auc_score
from tabulate import tabulate
from torch import Tensor

from stpm.data import mvtec
from stpm.detector import Detector
from stpm.fitting.build_memory import MemoryCandidates
from stpm.fitting.calibrate import calibrate
from stpm.fitting.splits import Indices
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.training_images import load_images, preprocessing_for
from stpm.method.anomaly_maps import Float32Array
from stpm.method.calibration import FAR, spreads_above, threshold
from stpm.method.memory_bank import DescriptorSpec
from stpm.method.outliers import neighbour_distances, score_images
from stpm.method.recipe import PRESETS, Recipe

_RAM_BUDGET = 4 * 2**30
_SHARES = (0.01, 0.05, 0.1)
_MAX_POSITIONS = 64
_DRAWS = 2
# Images that `fit.html` shows; the default false-alarm rate.
_SHOWN, _RATE = 24, 0.01


class Mixed:
    """A category's images, good ones, the test's good ones and defects, with the teacher's features of them."""

    def __init__(self, category: mvtec.Category, recipe: Recipe) -> None:
        good = [uri for uri, _ in category.train]
        tests = [test.uri for test in category.test if test.label == mvtec.GOOD]
        defects = [test.uri for test in category.test if test.label != mvtec.GOOD]
        preprocessing = preprocessing_for(recipe, good)
        images = load_images([*good, *tests, *defects], preprocessing, _RAM_BUDGET)
        self.recipe = recipe
        self.features = TeacherFeatures(teacher_from(recipe, preprocessing), images, 2 * _RAM_BUDGET, _RAM_BUDGET)
        ends = np.cumsum([len(good), len(tests), len(defects)])
        self.good, self.tests, self.defects = np.split(np.arange(ends[-1]), ends[:-1])

    def draw(self, share: float, seed: int) -> Indices:
        """Choose as many defects as this share of the good images."""
        wanted = min(max(round(share * len(self.good)), 1), len(self.defects))
        return np.random.default_rng(seed).choice(self.defects, wanted, replace=False)

    @cached_property
    def described(self) -> Tensor:
        """The descriptors of all images, (N, P, C), in the coarsest level."""
        stride = math.ceil(math.sqrt(math.prod(self.features.shapes[-1]) / _MAX_POSITIONS))
        spec = DescriptorSpec(len(self.features.shapes) - 1, "features", stride, stride)
        batches = self.features.batches(np.arange(len(self.features.images)))
        return torch.cat([spec.describe(self.features(batch)[-1]).flatten(1, 2) for batch in batches])

    def fit(self, images: Indices) -> tuple[Detector, Float32Array]:
        """Fit a memory on images, by folds; return it with their scores, by ascending index."""
        candidates = MemoryCandidates(self.features, np.sort(images), self.recipe)
        detector = Detector.assemble(self.features.teacher, self.recipe, None, candidates.banks)
        parts = folds_of(candidates, np.random.default_rng(self.recipe.seed).permutation(images))
        scores, _, scales, _ = calibrate(detector, self.features, parts, images[:0])
        return dataclasses.replace(detector, distance_scales=scales), scores

    def spreads(self, images: Indices, scores: Float32Array, seed: int) -> list[Float32Array]:
        """Return how unusual images are by their distances, by their scores, and by both."""
        chosen = self.described[torch.from_numpy(images)]
        distances = neighbour_distances(chosen, torch.ones(chosen.shape[:2], dtype=torch.bool), seed)
        found = [spreads_above(score_images(distances).numpy()), spreads_above(scores)]
        return [*found, np.maximum(*found)]

    def measure(self, fitted: tuple[Detector, Float32Array], unseen: Indices) -> list[str]:
        """Return a model's image AUROC, recall and false alarms."""
        detector, scores = fitted
        good, found = (np.array(score_features(detector, self.features, each)) for each in (self.tests, unseen))
        cut = threshold(np.sort(scores), _RATE)
        auroc = roc_auc_score(np.repeat([False, True], [len(good), len(found)]), [*good, *found])
        return [f"{float(value):.3f}" for value in (auroc, (found > cut).mean(), (good > cut).mean())]


def compare(mixed: Mixed, name: str) -> Iterator[tuple[list[str], list[str]]]:
    """Yield for each share of defects how many are named, and what models find with and without them."""
    clean = mixed.fit(mixed.good)
    for share in _SHARES:
        draws, models = [], []
        for seed in reversed(range(_DRAWS)):
            defects = mixed.draw(share, seed)
            images = np.sort(np.concatenate([mixed.good, defects]))
            models = [mixed.fit(images)]
            ways, is_defect = mixed.spreads(images, models[0][1], seed), np.isin(images, defects)
            orders = [np.argsort(-way) for way in ways]
            named = [is_defect[order[: k * len(defects)]].sum() / len(defects) for order in orders for k in (1, 2)]
            draws.append([*named, *((ways[-1][each] > FAR).sum() for each in (is_defect, ~is_defect))])
        *named, far, far_good = np.mean(draws, axis=0)
        places = [f"{first:.2f} / {twice:.2f}" for first, twice in zip(named[::2], named[1::2], strict=True)]
        row = [name, f"{share:.0%}", *places]
        excluded = np.intersect1d(images[orders[-1][:_SHOWN]], defects)
        models += [mixed.fit(np.setdiff1d(images, excluded)) if len(excluded) else models[0], clean]
        columns = [mixed.measure(each, np.setdiff1d(mixed.defects, defects)) for each in models]
        together = [" / ".join(values) for values in zip(*columns, strict=True)]
        rows = (
            [*row, f"{far:.1f} of {len(defects)}, {far_good:.1f} of {len(mixed.good)}"],
            [*row[:2], f"{len(excluded)} of {len(defects)}", *together],
        )
        print(*rows[0], *rows[1][2:], flush=True)
        yield rows


def main() -> None:
    parser = make_fit_parser(__doc__)
    parser.add_argument("--recipe", default="", help="name=value pairs on top of the preset")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    teacher = {"teacher": arguments.teacher, "teacher_weights": arguments.teacher_weights}
    recipe = change_recipe(dataclasses.replace(PRESETS["default"], student="none", **teacher), arguments.recipe)
    rows: list[tuple[list[str], list[str]]] = []
    for name in mvtec.find_categories(arguments.data, arguments.categories):
        rows += compare(Mixed(mvtec.read_category(arguments.data, name), recipe), name)
    named, fitted = zip(*rows, strict=True)
    print(tabulate(named, ["product", "defects", "distance", "score", "both", "far out: defects, good"], "pipe"))
    of_models = [f"excluded of the first {_SHOWN}", "AUROC: with / after / clean", "recall", "false alarms"]
    print(tabulate(fitted, ["product", "defects", *of_models], "pipe"))


if __name__ == "__main__":
    main()
