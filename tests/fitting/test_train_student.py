import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stpm.errors import ConfigError, DivergedError
from stpm.fitting.checkpoint import Checkpoint, FitState
from stpm.fitting.task import Epoch
from stpm.fitting.train_student import TrainedStudent, learning_rate
from stpm.fitting.training_images import TrainingImages
from stpm.method.recipe import PRESETS, Recipe
from stpm.options import Integers, Size
from tests.conftest import MODELS
from tests.fitting.helpers import PADDED, FeaturesOf, replace_padding, same_tensors, train_on, unpadded


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_seed_decides_every_weight(preset: str, tiny: Recipe, features_of: FeaturesOf) -> None:
    ours = ("teacher", "teacher_weights", "size", "epochs", "precision", "held_out_fraction")
    recipe = dataclasses.replace(PRESETS[preset], **{name: getattr(tiny, name) for name in ours})  # type: ignore[index]
    features = features_of(recipe)
    first, again, other = (train_on(features, dataclasses.replace(recipe, seed=seed)) for seed in (0, 0, 1))
    assert same_tensors(first.student, again.student)
    assert [e.train_loss for e in first.history] == [e.train_loss for e in again.history]
    assert not same_tensors(first.student, other.student)
    assert [epoch.number for epoch in first.history] == [1, 2]
    assert all(0 < epoch.train_loss < 2 and 0 < epoch.validation_loss < 2 for epoch in first.history)


class InterruptedTrainingError(Exception):
    pass


class InMemoryCheckpoint(Checkpoint):
    """Save after every epoch, and raise an error after the n-th."""

    def __init__(self, dies_after: int) -> None:
        self.state: FitState | None = None
        self._left = dies_after

    def load(self) -> FitState | None:
        return self.state

    def is_due(self) -> bool:
        return True

    def save(self, state: FitState) -> None:
        self.state = copy.deepcopy(state)
        self._left -= 1
        if not self._left:
            raise InterruptedTrainingError


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("dies_after", [1, 3])
def test_interrupted_training_ends_with_the_same_bits(
    tiny: Recipe, features_of: FeaturesOf, optimiser: str, keep: str, dies_after: int
) -> None:
    recipe = dataclasses.replace(
        tiny, optimiser=optimiser, keep=keep, epochs=5, schedule="cosine", warmup_epochs=2, learning_rate=0.01
    )
    features, checkpoint = features_of(recipe), InMemoryCheckpoint(dies_after)
    uninterrupted = train_on(features, recipe)
    with pytest.raises(InterruptedTrainingError):
        train_on(features, recipe, checkpoint)
    seen: list[Epoch] = []
    resumed = train_on(features, recipe, checkpoint, seen)
    assert [epoch.number for epoch in seen] == list(range(dies_after + 1, 6))
    assert same_tensors(uninterrupted.student, resumed.student)
    assert uninterrupted.kept_epoch.number == resumed.kept_epoch.number
    losses = [[(e.train_loss, e.validation_loss) for e in result.history] for result in (uninterrupted, resumed)]
    assert losses[0] == losses[1]


def test_loss_falls(tiny: Recipe, features_of: FeaturesOf) -> None:
    recipe = dataclasses.replace(tiny, optimiser="adam", learning_rate=1e-3, loss_factor=1.0, epochs=20)
    history = train_on(features_of(recipe), recipe).history
    assert history[-1].train_loss < 0.7 * history[0].train_loss


def test_best_or_last_epoch_is_kept_and_training_stops_early(tiny: Recipe, features_of: FeaturesOf) -> None:
    features = features_of(tiny)

    def train(**changes: object) -> tuple[TrainedStudent, object]:
        trained = train_on(features, dataclasses.replace(tiny, **changes))  # type: ignore[arg-type]
        return trained, min(trained.history, key=lambda epoch: epoch.validation_loss)

    kept_best, best = train(keep="best", epochs=5)
    assert kept_best.kept_epoch == best
    kept_last, _ = train(keep="last", epochs=5)
    assert kept_last.kept_epoch == kept_last.history[-1]
    stopped, best = train(epochs=200, early_stopping=3, learning_rate=0.01)
    assert len(stopped.history) == best.number + 3 < 200  # type: ignore[attr-defined]
    assert train_on(features, MODELS["memory"]) == TrainedStudent(None, (), None)


class CountFetches(TorchDispatchMode):
    """Count the values that are fetched from a device one by one, each of which waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch_size", [1, 8])
def test_an_epoch_waits_for_its_device_once_however_many_steps_it_has(
    tiny: Recipe, features_of: FeaturesOf, batch_size: int
) -> None:
    features, counts = features_of(tiny), []
    for epochs in (1, 3):
        with CountFetches() as fetches:
            train_on(features, dataclasses.replace(tiny, batch_size=batch_size, epochs=epochs))
        counts.append(fetches.count)
    assert counts[1] - counts[0] == 2


def test_learning_rate_warms_up_and_decays() -> None:
    recipe = Recipe(epochs=10, learning_rate=1.0, warmup_epochs=2, schedule="cosine")
    rates = [learning_rate(recipe, step, 5) for step in range(50)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:], 0.5 * (1 + np.cos(np.pi * np.arange(40) / 40)))
    assert {learning_rate(Recipe(), step, 5) for step in range(500)} == {0.4}


def test_what_cannot_be_trained_is_refused(images: TrainingImages, tiny: Recipe, features_of: FeaturesOf) -> None:
    small = dataclasses.replace(tiny, size=Size("32"), levels=Integers((1, 2, 3, 4)))
    with pytest.raises(ConfigError, match="level 4 of test_resnet has a single position at an input of 32x32; give"):
        train_on(features_of(small, unpadded(images.pixels[:, ::2, ::2])), small)
    diverging = dataclasses.replace(tiny, learning_rate=1e30, epochs=5)
    message = r"training loss is \S+ and validation loss nan in epoch \d+; lower --learning-rate"
    with pytest.raises(DivergedError, match=message):
        train_on(features_of(diverging), diverging)


def test_student_does_not_learn_from_padding(images: TrainingImages, tiny: Recipe, features_of: FeaturesOf) -> None:
    """Replace the teacher's features on padding: the student stays the same."""
    features = features_of(tiny, dataclasses.replace(images, content=PADDED))
    before = train_on(features, tiny)
    replace_padding(features, 0.5)
    assert same_tensors(before.student, train_on(features, tiny).student)
    assert features_of(tiny).content_masks(np.arange(9)) == [None] * 3
