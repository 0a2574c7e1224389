"""The state of an unfinished fit in the model store, so that a crash costs only the work since the last checkpoint.

A checkpoint is one safetensors object, published whole, and removed once the model is in the store. It holds the
fingerprint of its task: a task ignores checkpoints of another recipe, teacher or set of images.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from stpm import storage
from stpm.errors import ModelError
from stpm.fitting.task import Epoch
from stpm.method.backbones import StateDict, deserialise, serialise

_HEADER = "json"


@dataclass(frozen=True)
class FitState:
    """Everything that training continues from. Random numbers follow from the seed and the epoch's number.

    The next step of the training changes its tensors.

    Args:
        optimiser: the optimiser's tensors, by the index of their parameter and their name.
        best: weights of the epoch with the lowest validation loss; empty if the recipe keeps the last.
    """

    student: StateDict
    optimiser: dict[int, dict[str, Tensor]]
    best: StateDict
    history: tuple[Epoch, ...]


class Checkpoint:
    """The checkpoint of a student's training.

    Args:
        fingerprint: digest of everything that the student depends on; a checkpoint with another one is ignored.
        interval: minimum seconds between two checkpoints.
    """

    def __init__(self, uri: str, fingerprint: str, interval: float) -> None:
        self._uri = uri
        self._fingerprint = fingerprint
        self._interval = interval
        self._saved_at = time.monotonic()

    def load(self) -> FitState | None:
        """Return the state to continue from, or None to start from the beginning, which gives the same bits."""
        try:
            tensors = deserialise(storage.read(self._uri), self._uri)
            header = json.loads(bytes(tensors[_HEADER].tolist()))
        except (FileNotFoundError, ModelError, KeyError, ValueError):
            return None
        if header["fingerprint"] != self._fingerprint:
            return None
        optimiser: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _select("optimiser.", tensors).items():
            index, key = name.split(".", 1)
            optimiser.setdefault(int(index), {})[key] = tensor
        history = tuple(Epoch(**epoch) for epoch in header["history"])
        return FitState(_select("student.", tensors), optimiser, _select("best.", tensors), history)

    def is_due(self) -> bool:
        """Return whether to save now, at the end of an epoch."""
        return time.monotonic() - self._saved_at >= self._interval

    def save(self, state: FitState) -> None:
        """Save a state in place of the previous one."""
        history = [dataclasses.asdict(epoch) for epoch in state.history]
        header = json.dumps({"fingerprint": self._fingerprint, "history": history})
        groups = {"student": state.student, "best": state.best}
        groups |= {f"optimiser.{index}": tensors for index, tensors in state.optimiser.items()}
        tensors = {f"{group}.{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
        tensors[_HEADER] = torch.tensor(list(header.encode()), dtype=torch.uint8)
        storage.publish(self._uri, serialise(tensors))
        self._saved_at = time.monotonic()


def _select(prefix: str, tensors: StateDict) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
