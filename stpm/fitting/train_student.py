"""Train one student on decoded images. No Ray, no storage."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stpm.errors import ConfigError, DivergedError
from stpm.fitting.checkpoint import Checkpoint, FitState
from stpm.fitting.splits import Indices, split_batches
from stpm.fitting.task import Epoch
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.method.backbones import Backbone, StateDict, build_seeded_backbone
from stpm.method.loss import matching_loss
from stpm.method.recipe import Recipe
from stpm.method.teacher import to_device


@dataclass(frozen=True)
class TrainedStudent:
    """The weights of a trained student, on the CPU, all its epochs, and the one that the weights are from.

    It is empty if the recipe has no student.
    """

    student: StateDict | None = None
    history: tuple[Epoch, ...] = ()
    kept_epoch: Epoch | None = None


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step, counted from 0 over all epochs."""
    warmup = recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    progress = (step - warmup) / (recipe.epochs * steps_per_epoch - warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def train_student(
    features: TeacherFeatures,
    train: Indices,
    held_out: Indices,
    recipe: Recipe,
    on_epoch: Callable[[Epoch], None],
    checkpoint: Checkpoint | None = None,
) -> TrainedStudent:
    """Train one student.

    The same recipe, images, kind of device and number of threads give the same bits, even if training resumes from a
    checkpoint. The validation loss is that of the held-out images.

    Raises:
        ConfigError: if a level has a single position.
        DivergedError: if a loss is not finite.
    """
    if recipe.student == "none":
        return TrainedStudent()
    _check_positions(features, recipe)
    student = to_device(
        build_seeded_backbone(recipe.teacher, recipe.levels, recipe.seed, recipe.zero_init_residual),
        features.teacher.device,
    )
    optimiser = _make_optimiser(student, recipe)
    history: list[Epoch] = []
    best: StateDict = {}
    if checkpoint and (state := checkpoint.load()):
        student.net.load_state_dict(dict(state.student))
        groups = optimiser.state_dict()["param_groups"]
        optimiser.load_state_dict({"state": state.optimiser, "param_groups": groups})
        history, best = list(state.history), state.best
    while not _has_ended(history, recipe):
        number = len(history) + 1
        start = time.perf_counter()
        train_loss = _train_epoch(student, optimiser, features, train, recipe, number)
        speed = len(train) / (time.perf_counter() - start)
        validation_loss = _validation_loss(student, features, held_out)
        if not math.isfinite(train_loss + validation_loss):
            raise DivergedError(
                f"training loss is {train_loss:.4g} and validation loss {validation_loss:.4g} in epoch {number}; "
                f"lower --learning-rate ({recipe.learning_rate})"
            )
        epoch = Epoch(number, train_loss, validation_loss, speed)
        history.append(epoch)
        on_epoch(epoch)
        if recipe.keep == "best" and _best_epoch(history) is epoch:
            best = {name: weight.clone() for name, weight in student.net.state_dict().items()}
        if checkpoint and checkpoint.is_due():
            # Without momentum, a parameter's state is None.
            saved = optimiser.state_dict()["state"].items()
            state_of = {index: {k: v for k, v in state.items() if v is not None} for index, state in saved}
            checkpoint.save(FitState(student.net.state_dict(), state_of, best, tuple(history)))
    kept, epoch = (best, _best_epoch(history)) if recipe.keep == "best" else (student.net.state_dict(), history[-1])
    return TrainedStudent({name: weight.cpu() for name, weight in kept.items()}, tuple(history), epoch)


def _check_positions(features: TeacherFeatures, recipe: Recipe) -> None:
    """Raise ConfigError if a level has a single position: BatchNorm has no variance if a batch has one image."""
    teacher = features.teacher
    for level, index in zip(recipe.levels, teacher.student_indices(recipe.levels), strict=True):
        if features.shapes[index] == (1, 1):
            size = "x".join(map(str, teacher.views[-1].input_shape))
            raise ConfigError(
                f"level {level} of {recipe.teacher} has a single position at an input of {size}; give a larger "
                f"{'--coarse-pixels' if len(teacher.views) > 1 else '--size'}, or leave it out of --levels"
            )


def _best_epoch(history: Sequence[Epoch]) -> Epoch:
    return min(history, key=lambda epoch: epoch.validation_loss)


def _has_ended(history: Sequence[Epoch], recipe: Recipe) -> bool:
    if not history:
        return False
    epochs_since_best = history[-1].number - _best_epoch(history).number
    return len(history) == recipe.epochs or 0 < recipe.early_stopping <= epochs_since_best


def _make_optimiser(student: Backbone, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimiser == "adam":
        return torch.optim.Adam(student.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        student.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )


def _train_epoch(
    student: Backbone,
    optimiser: torch.optim.Optimizer,
    features: TeacherFeatures,
    train: Indices,
    recipe: Recipe,
    number: int,
) -> float:
    """Train on all images once, in an order by the seed and the epoch's number; return the mean loss."""
    student.train()
    order = train[np.random.default_rng((recipe.seed, number)).permutation(len(train))]
    batches = split_batches(order, recipe.batch_size)
    total = torch.zeros((), device=features.teacher.device)
    for step, batch in enumerate(batches, (number - 1) * len(batches)):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(recipe, step, len(batches))
        loss = _loss(student, features, batch)
        optimiser.zero_grad(set_to_none=True)
        (loss * recipe.loss_factor).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        total += loss.detach() * len(batch)
    return float(total) / len(order)


@torch.no_grad()
def _validation_loss(student: Backbone, features: TeacherFeatures, held_out: Indices) -> float:
    student.eval()
    # Whoever fetches a value waits for the device: fetch all at once.
    losses = [_loss(student, features, batch).double() * len(batch) for batch in features.batches(held_out)]
    return float(sum(torch.stack(losses).tolist())) / len(held_out)


def _loss(student: Backbone, features: TeacherFeatures, batch: Indices) -> Tensor:
    inputs, targets, valid = features.of_student(batch, student.levels)
    return matching_loss(targets, features.teacher.compute(student, inputs), valid)
