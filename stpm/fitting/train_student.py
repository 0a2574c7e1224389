"""One student's fit: decoded images to weights. No Ray, no storage."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stpm.errors import StpmError
from stpm.fitting.task import Epoch
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.method.backbones import Backbone, StateDict, build_student
from stpm.method.forward import to_device
from stpm.method.matching import matching_loss
from stpm.method.recipe import Recipe

Indices = npt.NDArray[np.int64]

# Where no gradient is kept and batch statistics play no part, the result does not depend on it.
EVALUATION_BATCH = 16


class DivergedError(StpmError):
    """A loss that is no longer a number."""


@dataclass(frozen=True)
class Progress:
    """All that decides how a fit goes on: the random stream of each epoch follows from its number and the seed.

    `optimiser` holds the optimiser's tensors by parameter and name; `best` is the student of the epoch with the lowest
    validation loss, empty if the recipe keeps the last.
    """

    student: StateDict
    optimiser: dict[int, dict[str, Tensor]]
    best: StateDict
    history: tuple[Epoch, ...]


class Checkpoints(Protocol):
    """Where a fit's progress is kept while it runs."""

    def load(self) -> Progress | None:
        """What to go on from, or None to start."""

    def due(self, last: bool) -> bool:
        """Whether it is time to save, at the end of an epoch that may be the last."""

    def save(self, progress: Progress) -> None:
        """Keep this instead of what was kept."""


@dataclass(frozen=True)
class Fitted:
    """A student's weights on the CPU, the losses of every epoch, and the epoch whose weights these are.

    A recipe without a student gives none of them.
    """

    student: StateDict | None = None
    history: tuple[Epoch, ...] = ()
    kept: Epoch | None = None


def split(count: int, recipe: Recipe) -> tuple[Indices, Indices]:
    """Random indices to train on and to hold out, ascending.

    Raises:
        DataError: if there are too few for the recipe.
    """
    recipe.check_image_count(count)
    order = np.random.default_rng(recipe.seed).permutation(count)
    held_out = recipe.held_out_count(count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step, counted from 0 over the whole fit."""
    warmup = recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    progress = (step - warmup) / (recipe.epochs * steps_per_epoch - warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def fit(
    features: TeacherFeatures,
    train: Indices,
    held_out: Indices,
    recipe: Recipe,
    on_epoch: Callable[[Epoch], None],
    checkpoints: Checkpoints | None = None,
) -> Fitted:
    """Fit one student.

    Args:
        features: the images, and the teacher's features of them.
        train: of which images the student learns.
        held_out: on which the validation loss is measured.
        recipe: the choices. The same recipe, images, kind of device and number of threads give the same student,
            also if the fit was interrupted and went on from its checkpoint.
        on_epoch: called after each epoch.
        checkpoints: where progress is kept; None keeps none.

    Raises:
        DivergedError: if a loss stops being finite.
    """
    if recipe.student == "none":
        return Fitted()
    matcher = features.matcher
    student = to_device(
        build_student(recipe.teacher, recipe.levels, recipe.seed, recipe.zero_init_residual),
        matcher.device,
    )
    optimiser = _optimiser(student, recipe)
    history: list[Epoch] = []
    best: StateDict = {}
    if checkpoints and (progress := checkpoints.load()):
        student.net.load_state_dict(dict(progress.student))
        groups = optimiser.state_dict()["param_groups"]
        optimiser.load_state_dict({"state": progress.optimiser, "param_groups": groups})
        history, best = list(progress.history), progress.best
    while not _ended(history, recipe):
        number = len(history) + 1
        order = train[np.random.default_rng((recipe.seed, number)).permutation(len(train))]
        start = time.perf_counter()
        train_loss = _train(student, optimiser, features, order, recipe, number)
        speed = len(train) / (time.perf_counter() - start)
        epoch = Epoch(number, train_loss, _validate(student, features, held_out), speed)
        if not math.isfinite(epoch.train_loss + epoch.validation_loss):
            raise DivergedError(
                f"loss is {train_loss} in epoch {number}; lower --learning-rate ({recipe.learning_rate})"
            )
        history.append(epoch)
        on_epoch(epoch)
        if recipe.keep == "best" and _best(history) is epoch:
            best = _copy(student)
        if checkpoints and checkpoints.due(_ended(history, recipe)):
            checkpoints.save(Progress(_copy(student), _tensors(optimiser), best, tuple(history)))
    if recipe.keep == "last":
        return Fitted(_copy(student), tuple(history), history[-1])
    return Fitted({k: v.cpu() for k, v in best.items()}, tuple(history), _best(history))


def _best(history: list[Epoch]) -> Epoch:
    return min(history, key=lambda epoch: epoch.validation_loss)


def _ended(history: list[Epoch], recipe: Recipe) -> bool:
    if len(history) == recipe.epochs:
        return True
    if not recipe.early_stopping or not history:
        return False
    return history[-1].number - _best(history).number >= recipe.early_stopping


def _copy(student: Backbone) -> StateDict:
    return {k: v.detach().cpu().clone() for k, v in student.net.state_dict().items()}


def _tensors(optimiser: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor | None]] = optimiser.state_dict()["state"]
    return {i: {k: v.cpu() for k, v in of.items() if v is not None} for i, of in state.items()}


def _optimiser(student: Backbone, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimiser == "adam":
        return torch.optim.Adam(student.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        student.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )


def batches(indices: Indices, size: int) -> list[Indices]:
    """Runs of `size` indices, the last one of what is left."""
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def _train(
    student: Backbone,
    optimiser: torch.optim.Optimizer,
    features: TeacherFeatures,
    order: Indices,
    recipe: Recipe,
    number: int,
) -> float:
    student.train()
    matcher = features.matcher
    total = torch.zeros((), device=matcher.device)
    steps = batches(order, recipe.batch_size)
    for step, chosen in enumerate(steps, (number - 1) * len(steps)):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(recipe, step, len(steps))
        loss = _loss(student, features, chosen)
        optimiser.zero_grad(set_to_none=True)
        (loss * recipe.loss_factor).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        total += loss.detach() * len(chosen)
    return float(total) / len(order)


@torch.no_grad()
def _validate(student: Backbone, features: TeacherFeatures, held_out: Indices) -> float:
    student.eval()
    losses = [float(_loss(student, features, chosen)) * len(chosen) for chosen in batches(held_out, EVALUATION_BATCH)]
    return sum(losses) / len(held_out)


def _loss(student: Backbone, features: TeacherFeatures, chosen: Indices) -> Tensor:
    indices = torch.from_numpy(chosen)
    of_student = features.matcher.features(student, features.inputs(indices))
    return matching_loss(features(indices), of_student, features.content_masks(indices))
