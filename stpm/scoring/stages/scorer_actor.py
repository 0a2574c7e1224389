"""The scorer as an actor of Ray Data. The driver imports this module, so it does not import torch at the top."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import ray

from stpm.errors import DeviceError
from stpm.method.arithmetic import Arithmetic
from stpm.scoring.progress import ProgressReporter, WarningRelay


@dataclass(frozen=True)
class ScorerSettings:
    """How a scorer works.

    Args:
        store: URI of the model store.
        model_ids: the model of each category.
        false_alarm_rate: for the thresholds.
        raw_maps: keep the anomaly maps.
        overlays: keep the pixels, for the overlays.
        batch_size: images per forward pass; 0: chosen by measuring on the device.
        model_ram: maximum bytes of the models that stay loaded.
        accept_errors: keep the rows with an error of RETRIED_ERRORS.
        arithmetic: what computes the features.
    """

    store: str
    model_ids: Mapping[str, str]
    false_alarm_rate: float
    raw_maps: bool = False
    overlays: bool = False
    batch_size: int = 0
    model_ram: int = 2**30
    accept_errors: bool = False
    arithmetic: Arithmetic = field(default_factory=Arithmetic)


class ScorerActor:
    """A `Scorer` that computes in as many threads as Ray assigned CPUs to this actor, at least one.

    If torch cannot use the actor's GPU, it stops the run. The first batch then raises DeviceError: Ray Data would print
    the traceback of an actor that does not start.
    """

    def __init__(self, settings: ScorerSettings, progress: ProgressReporter) -> None:
        import torch

        from stpm.scoring.stages.scorer import Scorer

        logging.getLogger("stpm").addHandler(WarningRelay(progress))
        torch.set_num_threads(max(int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)), 1))
        self._broken: DeviceError | None = None
        try:
            self._scorer = Scorer(settings, progress)
        except DeviceError as error:
            progress.stop(str(error))
            self._broken = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self._broken:
            raise self._broken
        return self._scorer(batch)
