"""One category's fit: images in memory to a student. No Ray, no I/O."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stpm.calibration import Calibration, calibrate
from stpm.errors import DataError, StpmError
from stpm.forward import Matcher, place
from stpm.images import Pixels
from stpm.matching import matching_loss
from stpm.networks import StateDict, Trunk, architecture_of, build_student
from stpm.recipe import Recipe

Indices = npt.NDArray[np.int64]

_FEATURE_BUDGET = 2 * 1024**3


class DivergedError(StpmError):
    """A loss that is no longer a number."""


@dataclass(frozen=True)
class Epoch:
    """Mean losses of one epoch (in [0, 2]), counted from 1, and its training speed."""

    number: int
    train_loss: float
    validation_loss: float
    images_per_second: float


@dataclass(frozen=True)
class Fitted:
    """A student's weights on the CPU, and how it came about."""

    student: StateDict
    history: tuple[Epoch, ...]
    kept: Epoch
    calibration: Calibration
    train_count: int
    validation_count: int


def split(count: int, share: float, seed: int) -> tuple[Indices, Indices]:
    """Random indices to train on and to hold out: a share of `count`, at least one of each.

    Raises:
        DataError: if there are fewer than two.
    """
    if count < 2:
        raise DataError(f"{count} defect-free image; at least 2 are needed, one to train on and one to hold out")
    order = np.random.default_rng(seed).permutation(count)
    held_out = min(max(round(count * share), 1), count - 1)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def fit(images: Pixels, matcher: Matcher, recipe: Recipe, on_epoch: Callable[[Epoch], None]) -> Fitted:
    """Fit one student.

    Args:
        images: (N, size, size, 3) uint8 RGB, defect-free, N ≥ 2.
        matcher: holds the teacher.
        recipe: the choices; the same recipe, images and device type give the same student.
        on_epoch: called after each epoch.

    Raises:
        DataError: if there are fewer than two images.
        DivergedError: if a loss stops being finite.
    """
    train, held_out = split(len(images), recipe.validation_share, recipe.seed)
    student = place(
        build_student(architecture_of(recipe.teacher), recipe.levels, recipe.seed, recipe.zero_init_residual),
        matcher.device,
    )
    optimiser = _optimiser(student, recipe)
    pixels = torch.from_numpy(images)
    teacher = _TeacherFeatures(matcher, pixels, recipe.batch)
    history: list[Epoch] = []
    best: tuple[Epoch, StateDict] = Epoch(0, math.inf, math.inf, 0.0), {}
    for number in range(1, recipe.epochs + 1):
        order = train[np.random.default_rng((recipe.seed, number)).permutation(len(train))]
        start = time.perf_counter()
        train_loss = _train(student, optimiser, matcher, pixels, teacher, order, recipe)
        speed = len(train) / (time.perf_counter() - start)
        epoch = Epoch(number, train_loss, _validate(student, matcher, pixels, teacher, held_out, recipe.batch), speed)
        if not math.isfinite(epoch.train_loss + epoch.validation_loss):
            raise DivergedError(
                f"loss is {train_loss} in epoch {number}; lower --learning-rate ({recipe.learning_rate})"
            )
        history.append(epoch)
        on_epoch(epoch)
        if recipe.keep == "last" or epoch.validation_loss < best[0].validation_loss:
            best = epoch, copy.deepcopy(student.net.state_dict())
    kept, state = best
    student.net.load_state_dict(dict(state))
    maps = [matcher.anomaly_maps(student.eval(), images[i]) for i in _batches(held_out, recipe.batch)]
    return Fitted(
        student={k: v.cpu() for k, v in state.items()},
        history=tuple(history),
        kept=kept,
        calibration=calibrate(np.concatenate(maps)),
        train_count=len(train),
        validation_count=len(held_out),
    )


class _TeacherFeatures:
    """The teacher's features of images by index: kept where they fit the budget, else computed anew.

    What is kept is the direction of each feature vector in half precision: all that the loss needs, and small
    enough never to overflow.
    """

    def __init__(self, matcher: Matcher, pixels: Tensor, batch: int) -> None:
        self._matcher = matcher
        self._pixels = pixels
        one = matcher.teacher_features(matcher.inputs(pixels[:1]))
        self._kept: list[Tensor] | None = None
        if sum(f.numel() for f in one) * 2 * len(pixels) <= _FEATURE_BUDGET:
            self._kept = [
                torch.empty((len(pixels), *f.shape[1:]), dtype=torch.float16, device=matcher.device).to(
                    memory_format=torch.channels_last
                )
                for f in one
            ]
            for indices in _batches(np.arange(len(pixels)), batch):
                for kept, level in zip(self._kept, self._compute(torch.from_numpy(indices)), strict=True):
                    kept[indices] = torch.nn.functional.normalize(level.float(), dim=1).half()

    def __call__(self, indices: Tensor) -> list[Tensor]:
        return self._compute(indices) if self._kept is None else [kept[indices] for kept in self._kept]

    def _compute(self, indices: Tensor) -> list[Tensor]:
        return self._matcher.teacher_features(self._matcher.inputs(self._pixels[indices]))


def _optimiser(student: Trunk, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimiser == "adam":
        return torch.optim.Adam(student.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        student.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )


def _batches(indices: Indices, size: int) -> list[Indices]:
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def _train(
    student: Trunk,
    optimiser: torch.optim.Optimizer,
    matcher: Matcher,
    pixels: Tensor,
    teacher: _TeacherFeatures,
    order: Indices,
    recipe: Recipe,
) -> float:
    student.train()
    total = torch.zeros((), device=matcher.device)
    for chosen in _batches(order, recipe.batch):
        indices = torch.from_numpy(chosen)
        loss = matching_loss(teacher(indices), matcher.features(student, matcher.inputs(pixels[indices])))
        optimiser.zero_grad(set_to_none=True)
        (loss * recipe.loss_scale).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        total += loss.detach() * len(chosen)
    return float(total) / len(order)


@torch.no_grad()
def _validate(
    student: Trunk, matcher: Matcher, pixels: Tensor, teacher: _TeacherFeatures, held_out: Indices, batch: int
) -> float:
    student.eval()
    total = 0.0
    for chosen in _batches(held_out, batch):
        indices = torch.from_numpy(chosen)
        loss = matching_loss(teacher(indices), matcher.features(student, matcher.inputs(pixels[indices])))
        total += float(loss) * len(chosen)
    return total / len(held_out)
