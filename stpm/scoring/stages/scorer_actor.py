"""The scorer as an actor of Ray Data. Light: the driver only names it, and need not import torch for that."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

# Images per forward pass, and so rows at a time, on a GPU.
LARGEST_BATCH = 256


class ScorerActor:
    """A `stpm.scoring.stages.scorer.Scorer`, imported where it is made.

    Args:
        arguments: the scorer's own.
    """

    def __init__(self, *arguments: Any) -> None:
        from stpm.scoring.stages.scorer import Scorer

        self._score = Scorer(*arguments)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self._score(batch)
