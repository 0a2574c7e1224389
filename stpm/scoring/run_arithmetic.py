"""What computes the features of a run: chosen by its devices when it begins, recorded, and kept where they can."""

from __future__ import annotations

import logging
from dataclasses import replace

from stpm.cluster.device import examine_devices
from stpm.method.arithmetic import Arithmetic, choose_arithmetic, warn_of_other_arithmetic
from stpm.scoring.run_state import RunState
from stpm.scoring.scoring_run import ModelRecords, ScoringRun

log = logging.getLogger(__name__)


def settle_arithmetic(run: ScoringRun, state: RunState, models: ModelRecords, *, gpus: bool) -> Arithmetic:
    """Choose what computes the features from now on, on GPUs or on CPUs, and record it. Needs a connection to Ray.

    Warn if that changes during the run, and where models were calibrated otherwise.

    Raises:
        ConfigError: if OpenVINO is wanted and not installed.
        DeviceError: if torch cannot use a GPU that Ray assigns.
    """
    before = state.record.arithmetic
    found = choose_arithmetic(examine_devices(gpus=gpus), run.cluster.backend, before=before)
    if found == before:
        return found
    state.write(replace(state.record, arithmetic=found))
    if before:
        log.warning(f"the remaining images may get slightly other scores: {before} has computed them, and now {found}")
    calibrated = [(record.fit.backend, record.precision) for record in models.values()]
    if warning := warn_of_other_arithmetic(found, calibrated):
        log.warning(warning)
    return found
