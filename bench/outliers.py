"""Mix real defects into the good images of products; count how many of them a fit would name, and what that repairs.

    python bench/outliers.py --data DATA
    python bench/outliers.py --data DATA --fit 'pixels=40960 coarse_pixels=0 brightness=0 memory=1000'

Prints, for 1, 5 and 10 % of test defects among the good training images, the share of them that is in the first places,
as many places as there are defects / twice as many, by the distance to the k-th nearest image in the coarsest level of
the coarse view, as in a fit, and of the fine view. Then how many defects, and how many good images, lie far out in the
coarse view. Means over draws of the defects.

With --fit, fits preset `default` without a student, with these name=value pairs on top: on the good images and the
defects; on what is left when a person has excluded the defects among the first images, as many as `fit.html` shows; and
on the good images. Prints image AUROC of each, and recall and false alarms at the threshold for one percent, on the
test images but those that were mixed in; of one draw.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from local_fit import calibrate_on, change_recipe, folds_of, make_fit_parser, score_features, teacher_from
from sklearn.metrics import roc_auc_score
from tabulate import tabulate
from torch import Tensor

from stpm.data import mvtec
from stpm.detector import Detector
from stpm.fitting.build_memory import MemoryCandidates
from stpm.fitting.splits import Indices
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.training_images import load_images, preprocessing_for
from stpm.method.calibration import threshold
from stpm.method.memory_bank import DescriptorSpec
from stpm.method.outliers import lies_far, neighbour_distances, score_images
from stpm.method.recipe import PRESETS, Recipe

_RAM_BUDGET = 4 * 2**30
_SHARES = (0.01, 0.05, 0.1)
_MAX_POSITIONS = 64
_DRAWS = 2
# Images that `fit.html` shows; the default false-alarm rate.
_SHOWN, _RATE = 24, 0.01


class Mixed:
    """A category's images, good ones, the test's good ones and defects, with the teacher's features of them."""

    def __init__(self, category: mvtec.Category, recipe: Recipe, with_good_tests: bool) -> None:
        good = [uri for uri, _ in category.train]
        tests = [test.uri for test in category.test if with_good_tests and test.label == mvtec.GOOD]
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

    def describe(self, index: int) -> Tensor:
        """Return the descriptors of all images, (N, P, C), in a level of the teacher's."""
        stride = math.ceil(math.sqrt(math.prod(self.features.shapes[index]) / _MAX_POSITIONS))
        spec = DescriptorSpec(index, "features", stride, stride)
        batches = self.features.batches(np.arange(len(self.features.images)))
        return torch.cat([spec.describe(self.features(batch)[index]).flatten(1, 2) for batch in batches])

    def fit(self, images: Indices) -> tuple[Detector, float]:
        """Fit a memory on images, by folds; return it with its threshold."""
        candidates = MemoryCandidates(self.features, np.sort(images), self.recipe)
        detector = Detector.assemble(self.features.teacher, self.recipe, None, candidates.banks)
        parts = folds_of(candidates, np.random.default_rng(self.recipe.seed).permutation(images))
        detector, scores = calibrate_on(detector, self.features, parts, images[:0])
        return detector, threshold(scores, _RATE)


def rank(described: Tensor, images: Indices, seed: int) -> Tensor:
    """Return how far out each of these images lies from the others of them."""
    chosen = described[torch.from_numpy(images)]
    return score_images(neighbour_distances(chosen, torch.ones(chosen.shape[:2], dtype=torch.bool), seed))


def count(mixed: Mixed, described: Tensor, share: float, seed: int) -> list[float]:
    """Return the shares of mixed-in defects in the first places, and how many defects and good images lie far out."""
    defects, good = mixed.draw(share, seed), len(mixed.good)
    scores = rank(described, np.concatenate([mixed.good, defects]), seed)
    is_defect = scores.argsort(descending=True) >= good
    far = lies_far(scores)
    found = [float(is_defect[: places * len(defects)].sum()) / len(defects) for places in (1, 2)]
    return [*found, float(far[good:].sum()), float(far[:good].sum()), len(defects)]


def name_defects(mixed: Mixed, name: str) -> list[list[str]]:
    """Return rows of how many defects are named."""
    views = [
        mixed.describe(index)
        for index in (len(mixed.features.shapes) - 1, len(mixed.features.teacher.views[0].levels) - 1)
    ]
    rows = []
    for share in _SHARES:
        coarse, fine = (np.mean([count(mixed, view, share, seed) for seed in range(_DRAWS)], axis=0) for view in views)
        places = [f"{first:.2f} / {twice:.2f}" for first, twice, *_ in (coarse, fine)]
        far = f"{coarse[2]:.1f} of {coarse[4]:.0f}, {coarse[3]:.1f} of {len(mixed.good)}"
        rows.append([name, f"{share:.0%}", *places, far])
        print(*rows[-1], flush=True)
    return rows


def fit_models(mixed: Mixed, name: str) -> list[list[str]]:
    """Return rows of what models find with the defects, without those that a person excludes, and without any."""
    described = mixed.describe(-1)
    clean = mixed.fit(mixed.good)
    rows = []
    for share in _SHARES:
        defects = mixed.draw(share, 0)
        images = np.concatenate([mixed.good, defects])
        shown = images[rank(described, images, 0).argsort(descending=True)[:_SHOWN].numpy()]
        excluded = np.intersect1d(shown, defects)
        models = (mixed.fit(images), mixed.fit(np.setdiff1d(images, excluded)) if len(excluded) else None, clean)
        unseen = np.setdiff1d(mixed.defects, defects)
        columns = []
        for detector, cut in (models[0], models[1] or models[0], models[2]):
            good, found = (np.array(score_features(detector, mixed.features, each)) for each in (mixed.tests, unseen))
            auroc = roc_auc_score(np.repeat([False, True], [len(good), len(found)]), [*good, *found])
            columns.append([f"{float(value):.3f}" for value in (auroc, (found > cut).mean(), (good > cut).mean())])
        together = [" / ".join(values) for values in zip(*columns, strict=True)]
        rows.append([name, f"{share:.0%}", f"{len(excluded)} of {len(defects)}", *together])
        print(*rows[-1], flush=True)
    return rows


def main() -> None:
    parser = make_fit_parser(__doc__)
    parser.add_argument("--fit", help="fit models, with these name=value pairs on top of the preset")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    teacher = {"teacher": arguments.teacher, "teacher_weights": arguments.teacher_weights}
    recipe = dataclasses.replace(PRESETS["default"], student="none", **teacher)
    recipe = change_recipe(recipe, arguments.fit or "")
    fits = arguments.fit is not None
    rows = []
    for name in mvtec.find_categories(arguments.data, arguments.categories):
        mixed = Mixed(mvtec.read_category(arguments.data, name), recipe, with_good_tests=fits)
        rows += (fit_models if fits else name_defects)(mixed, name)
    of_names = ["coarse view", "fine view", "far out: defects, good"]
    of_models = [f"excluded of the first {_SHOWN}", "AUROC: with / after / clean", "recall", "false alarms"]
    print(tabulate(rows, ["product", "defects", *(of_models if fits else of_names)], "pipe"))


if __name__ == "__main__":
    main()
