"""A fit's progress in the model store, so that whatever kills it costs at most what came after.

One safetensors object, published whole and removed when the model is there. It names the task that it belongs to:
progress of another recipe, teacher or set of images is no progress.
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
from stpm.fitting.train_student import Progress
from stpm.method.backbones import deserialise, serialise

_JSON = "json"


class StoredCheckpoints:
    """Checkpoints at a URI.

    Args:
        uri: of the object.
        fingerprint: of all that the fit depends on.
        seconds: between two checkpoints, at least.
        keep_end: save the end of the fit too, since its task goes on.
    """

    def __init__(self, uri: str, fingerprint: str, seconds: float, keep_end: bool) -> None:
        self._uri = uri
        self._keep_end = keep_end
        self._fingerprint = fingerprint
        self._seconds = seconds
        self._last = time.monotonic()

    def load(self) -> Progress | None:
        """The progress of this very task, or None."""
        try:
            tensors = dict(deserialise(storage.read(self._uri), self._uri))
            header = json.loads(bytes(tensors.pop(_JSON).tolist()))
        except (FileNotFoundError, ModelError, KeyError, ValueError):
            # Missing, or damaged by whatever killed the last run: the fit starts over, which loses time alone.
            return None
        if header["fingerprint"] != self._fingerprint:
            return None
        optimiser: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimiser", tensors).items():
            index, key = name.split(".", 1)
            optimiser.setdefault(int(index), {})[key] = tensor
        return Progress(
            student=_under("student", tensors),
            optimiser=optimiser,
            best=_under("best", tensors),
            history=tuple(Epoch(**epoch) for epoch in header["history"]),
        )

    def due(self, last: bool) -> bool:
        if last:
            return self._keep_end
        return time.monotonic() - self._last >= self._seconds

    def save(self, progress: Progress) -> None:
        header = {
            "fingerprint": self._fingerprint,
            "history": [dataclasses.asdict(epoch) for epoch in progress.history],
        }
        tensors = {_JSON: torch.tensor(list(json.dumps(header).encode()), dtype=torch.uint8)}
        tensors |= {f"student.{k}": v for k, v in progress.student.items()}
        tensors |= {f"best.{k}": v for k, v in progress.best.items()}
        tensors |= {f"optimiser.{i}.{k}": v for i, of in progress.optimiser.items() for k, v in of.items()}
        storage.publish(self._uri, serialise(tensors))
        self._last = time.monotonic()

    def clear(self) -> None:
        storage.remove(self._uri)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
