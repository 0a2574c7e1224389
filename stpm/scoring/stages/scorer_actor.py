"""The scorer as an actor of Ray Data. The driver imports this module, so it does not import torch at the top."""

from __future__ import annotations

import logging

import pyarrow as pa
import ray

from stpm.errors import DeviceError
from stpm.method.arithmetic import Arithmetic
from stpm.models.store import ModelStore
from stpm.scoring.options import OutputOptions, ScoreOptions
from stpm.scoring.progress import ProgressReporter, WarningRelay
from stpm.scoring.scoring_run import ModelRecords


class ScorerActor:
    """A `Scorer` that computes in as many threads as Ray assigned CPUs to this actor, at least one.

    If torch cannot use the actor's GPU, it stops the run. The first batch then raises DeviceError: Ray Data would print
    the traceback of an actor that does not start.
    """

    def __init__(
        self,
        store: ModelStore,
        models: ModelRecords,
        options: ScoreOptions,
        output: OutputOptions,
        arithmetic: Arithmetic,
        progress: ProgressReporter,
    ) -> None:
        import torch

        from stpm.scoring.stages.scorer import Scorer

        logging.getLogger("stpm").addHandler(WarningRelay(progress))
        torch.set_num_threads(max(int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)), 1))
        self._broken: DeviceError | None = None
        try:
            self._scorer = Scorer(store, models, options, output, arithmetic, progress)
        except DeviceError as error:
            progress.stop(str(error))
            self._broken = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self._broken:
            raise self._broken
        return self._scorer(batch)
