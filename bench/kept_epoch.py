"""Measure false alarms where the images that choose the epoch (`--keep best`) also calibrate the model.

    python bench/kept_epoch.py --data DATA --preset paper --seeds 0,1,2 --out FILE.jsonl 'size=64 epochs=40'

Fits a student on some good images of a category, and after each epoch computes validation loss and score of each other
one, test/good too. Then draws images from these again and again: some choose the epoch and set the threshold, and an
image among the rest that scores higher is a false alarm. Prints how often, less the promised rate of k/(n+1) (k is the
threshold's rank among n images), with the epoch of the lowest loss, with this epoch and a threshold from other images,
and with the last epoch: a mean over categories and seeds, and its standard error. Appends a JSON line per fit to FILE,
and does not repeat a fit that FILE holds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from commands import integers
from local_fit import change_recipe, make_fit_parser, teacher_from
from results import Results
from tabulate import tabulate
from torch import Tensor

from stpm import storage
from stpm.data import mvtec
from stpm.detector import Detector
from stpm.fitting.build_memory import MemoryCandidates
from stpm.fitting.calibrate import calibrate
from stpm.fitting.checkpoint import Checkpoint, FitState
from stpm.fitting.splits import Indices
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.train_student import train_student
from stpm.fitting.training_images import load_images, preprocessing_for
from stpm.method.calibration import threshold, threshold_rank
from stpm.method.loss import matching_loss
from stpm.method.memory_bank import MemoryBank
from stpm.method.recipe import PRESETS, Recipe

_RAM_BUDGET = 4 * 2**30
_RATES = (0.05, 0.1, 0.2)
_CALIBRATING = (20, 50)
_DRAWS = 2000

Array = npt.NDArray[np.float32]


@dataclasses.dataclass
class EveryEpoch(Checkpoint):
    """Checkpoints that keep no weights, but validation loss and score of some images after each epoch."""

    features: TeacherFeatures
    recipe: Recipe
    memory: tuple[MemoryBank, ...]
    others: Indices
    losses: list[Array] = dataclasses.field(default_factory=list)
    scores: list[Array] = dataclasses.field(default_factory=list)

    def load(self) -> None:
        """Start from the beginning."""

    def is_due(self) -> bool:
        """Save after each epoch."""
        return True

    @torch.no_grad()
    def save(self, state: FitState) -> None:
        """Compute losses and scores."""
        features, teacher = self.features, self.features.teacher
        detector = Detector.assemble(teacher, self.recipe, state.student, self.memory)
        assert detector.student
        losses = []
        for batch in features.batches(self.others):
            inputs, targets, valid = features.of_student(batch, self.recipe.levels)
            levels = zip(targets, teacher.compute(detector.student, inputs), valid, strict=True)
            per_level = [_image_losses(*level) for level in levels]
            losses += np.mean(per_level, axis=0).tolist()
        self.losses.append(np.array(losses, np.float32))
        self.scores.append(calibrate(detector, features, [(detector.memory, self.others)], self.others)[0])


def _image_losses(teacher: Tensor, student: Tensor, valid: Tensor | None) -> list[float]:
    """Return the matching loss of each image at one level."""
    masks = [None] * len(teacher) if valid is None else [mask[None] for mask in valid]
    one_by_one = zip(teacher[:, None], student[:, None], masks, strict=True)
    return [float(matching_loss([t], [s], [mask])) for t, s, mask in one_by_one]


def run(features: TeacherFeatures, recipe: Recipe, count: int) -> dict[str, Any]:
    """Fit on `count` of the images, and draw from the others."""
    rng = np.random.default_rng(recipe.seed)
    order = rng.permutation(len(features.images))
    train, others = np.sort(order[:count]), np.sort(order[count:])
    epochs = EveryEpoch(features, recipe, MemoryCandidates(features, train, recipe).banks, others)
    train_student(features, train, others[:2], recipe, lambda epoch: None, epochs)
    losses, scores = np.array(epochs.losses), np.array(epochs.scores)
    return {"others": len(others)} | {str(n): _draw(rng, losses, scores, n) for n in _CALIBRATING}


def _draw(rng: np.random.Generator, losses: Array, scores: Array, n: int) -> dict[str, Any]:
    """Return the excess of false alarms at each rate, by what is kept, and how often the last epoch is the best."""
    excess, was_last = np.zeros((3, len(_RATES))), 0
    for _ in range(_DRAWS):
        order = rng.permutation(scores.shape[1])
        chosen, other, fresh = order[:n], order[n : 2 * n], order[2 * n :]
        best, last = int(np.argmin(losses[:, chosen].mean(axis=1))), len(losses) - 1
        was_last += best == last
        for row, (epoch, calibrating) in enumerate([(best, chosen), (best, other), (last, chosen)]):
            calibration = np.sort(scores[epoch, calibrating])
            for column, rate in enumerate(_RATES):
                alarms = np.mean(scores[epoch, fresh] > threshold(calibration, rate))
                excess[row, column] += alarms - threshold_rank(n, rate) / (n + 1)
    return {"excess": (excess / _DRAWS).tolist(), "last_is_best": was_last / _DRAWS}


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the mean excess of false alarms, by choice, number of images and what is kept, with standard errors."""
    rows = []
    for choice, n in itertools.product(dict.fromkeys(line["settings"]["choice"] for line in lines), _CALIBRATING):
        chosen = [line[str(n)] for line in lines if line["settings"]["choice"] == choice]
        excess = np.array([each["excess"] for each in chosen])
        means, errors = excess.mean(axis=0), excess.std(axis=0, ddof=1) / math.sqrt(len(chosen))
        last = np.mean([each["last_is_best"] for each in chosen])
        for row, name in enumerate(("best", "best, other images calibrate", "last")):
            shown = [f"{mean:+.4f} ± {error:.4f}" for mean, error in zip(means[row], errors[row], strict=True)]
            rows.append([choice, n, name, len(chosen), *shown, f"{last:.2f}"])
    return tabulate(
        rows, ["choice", "n", "kept", "fits", *map(str, _RATES), "last is best"], "pipe", disable_numparse=True
    )


def main() -> None:
    parser = make_fit_parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="default")
    parser.add_argument("--seeds", type=integers, default="0,1,2", help="of splits and fits (default: 0,1,2)")
    parser.add_argument("--images", type=int, default=80, help="good images to fit on (default: 80)", metavar="N")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines; an existing one is continued")
    parser.add_argument("choices", nargs="*", default=[""], help="name=value pairs on top of the preset")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results, lines = Results(arguments.out), []
    teacher = {"teacher": arguments.teacher, "teacher_weights": arguments.teacher_weights}
    base = dataclasses.replace(PRESETS[arguments.preset], **teacher)
    common = {
        "data": storage.absolute(arguments.data),
        "preset": arguments.preset,
        "images": arguments.images,
    } | teacher
    for name in mvtec.find_categories(arguments.data, arguments.categories):
        category = mvtec.read_category(arguments.data, name)
        uris = [uri for uri, _ in category.train] + [test.uri for test in category.test if test.label == mvtec.GOOD]
        for choice in arguments.choices:
            recipe = change_recipe(base, choice)
            recipe = dataclasses.replace(recipe, epochs=recipe.for_image_count(arguments.images).epochs)
            preprocessing = preprocessing_for(recipe, uris)
            frozen, good = teacher_from(recipe, preprocessing), load_images(uris, preprocessing, _RAM_BUDGET)
            features = TeacherFeatures(frozen, good, _RAM_BUDGET, _RAM_BUDGET)
            for seed in arguments.seeds:
                settings = {"category": name, "choice": choice, "seed": seed} | common
                seeded = dataclasses.replace(recipe, seed=seed)
                lines.append(results.once(settings, partial(run, features, seeded, arguments.images)))
    print("\n" + table(lines))


if __name__ == "__main__":
    main()
