"""The scorer as an actor of Ray Data. The driver imports this module, so it does not import torch at the top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import ray

from stpm.scoring.progress import ProgressReporter


@dataclass(frozen=True)
class ScorerSettings:
    """How a scorer works.

    Args:
        store: URI of the model store.
        false_alarm_rate: fraction of good images above the threshold, 0 to 1.
        raw_maps: keep the anomaly maps.
        overlays: keep the pixels, to draw heatmaps over them.
        batch_size: images per forward pass; 0: found on the device.
        model_memory: bytes of models to keep loaded.
        model_ids: the model that scores each category, and no other; None: the store's current models.
        accept_errors: keep rows with a transient error too.
    """

    store: str
    false_alarm_rate: float
    raw_maps: bool = False
    overlays: bool = False
    batch_size: int = 0
    model_memory: int = 2**30
    model_ids: Mapping[str, str] | None = None
    accept_errors: bool = False


class ScorerActor:
    """A `Scorer` that computes in as many threads as Ray assigned CPUs to this actor, at least one."""

    def __init__(self, settings: ScorerSettings, report: ProgressReporter | None = None) -> None:
        import torch

        from stpm.scoring.stages.scorer import Scorer

        torch.set_num_threads(max(int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)), 1))
        self._scorer = Scorer(settings, report)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self._scorer(batch)
