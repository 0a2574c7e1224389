"""A measurement of `run.py`'s sections."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Measured:
    """One measurement: the job's value, the machine's own limit and the peer's value, in one unit."""

    name: str
    unit: str
    job: float
    limit: float
    peer: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def row(self) -> list[float]:
        """Return the three values and the two ratios, NaN without a peer."""
        peer = math.nan if self.peer is None else self.peer
        return [self.job, self.limit, peer, self.job / self.limit, self.job / peer]
