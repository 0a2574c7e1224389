"""The state of an unfinished fit in the model store, so that a crash costs only the work since the last checkpoint.

A checkpoint is one safetensors object, published whole, and removed once the model is in the store. It holds the
fingerprint of its task: a task ignores checkpoints of another recipe, teacher or set of images.
"""

from __future__ import annotations

import dataclasses
import json
import time

import torch
from torch import Tensor

from stpm import storage
from stpm.errors import ModelError
from stpm.fitting.task import Epoch
from stpm.fitting.train_student import FitState
from stpm.method.backbones import deserialise, serialise

_HEADER = "json"


class StoredCheckpoints:
    """Checkpoints at a URI.

    Args:
        uri: URI of the checkpoint's object.
        fingerprint: digest of everything that the student depends on; a checkpoint with another one is ignored.
        interval: minimum seconds between two checkpoints.
        save_end: also save the end of the training, for tasks that train several students.
    """

    def __init__(self, uri: str, fingerprint: str, interval: float, *, save_end: bool) -> None:
        self._uri = uri
        self._fingerprint = fingerprint
        self._interval = interval
        self._save_end = save_end
        self._saved_at = time.monotonic()

    def load(self) -> FitState | None:
        """Read the state of this task, or return None if there is none."""
        try:
            tensors = dict(deserialise(storage.read(self._uri), self._uri))
            header = json.loads(bytes(tensors.pop(_HEADER).tolist()))
        except (FileNotFoundError, ModelError, KeyError, ValueError):
            # Training starts from the beginning, and gives the same bits.
            return None
        if header["fingerprint"] != self._fingerprint:
            return None
        optimiser: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _select("optimiser", tensors).items():
            index, key = name.split(".", 1)
            optimiser.setdefault(int(index), {})[key] = tensor
        history = tuple(Epoch(**epoch) for epoch in header["history"])
        return FitState(_select("student", tensors), optimiser, _select("best", tensors), history)

    def is_due(self, training_ended: bool) -> bool:
        if training_ended:
            return self._save_end
        return time.monotonic() - self._saved_at >= self._interval

    def save(self, state: FitState) -> None:
        history = [dataclasses.asdict(epoch) for epoch in state.history]
        header = json.dumps({"fingerprint": self._fingerprint, "history": history})
        tensors = {_HEADER: torch.tensor(list(header.encode()), dtype=torch.uint8)}
        tensors |= {f"student.{k}": v for k, v in state.student.items()}
        tensors |= {f"best.{k}": v for k, v in state.best.items()}
        tensors |= {f"optimiser.{i}.{k}": v for i, values in state.optimiser.items() for k, v in values.items()}
        storage.publish(self._uri, serialise(tensors))
        self._saved_at = time.monotonic()


def _select(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
