"""What computes the features of a run: chosen by its devices when it begins, recorded, and kept where they can."""

from __future__ import annotations

import logging

from stpm.cluster.device import examine_devices
from stpm.method.arithmetic import Arithmetic, choose_arithmetic
from stpm.scoring.run_state import RunState
from stpm.scoring.scoring_run import ModelRecords, ScoringRun

log = logging.getLogger(__name__)


def settle_arithmetic(run: ScoringRun, state: RunState, models: ModelRecords, *, gpus: bool) -> Arithmetic:
    """Choose what computes the features from now on, and record it. Needs a connection to Ray.

    Warn if that changes during the run, and where models were calibrated otherwise.

    Args:
        run: its options may ask for a backend.
        state: of the run.
        models: by category.
        gpus: GPUs compute, not CPUs.

    Raises:
        ConfigError: if OpenVINO is wanted and not installed.
        DeviceError: if torch cannot use a GPU that Ray assigns.
    """
    before = state.arithmetic()
    found = choose_arithmetic(examine_devices(gpus=gpus), run.cluster.backend, before=before)
    if found == before:
        return found
    state.record_arithmetic(found)
    if before:
        log.warning(f"the remaining images may get slightly other scores: {before} has computed them, and now {found}")
    others = {
        str(calibrated)
        for record in models.values()
        if (calibrated := Arithmetic(record.fit.backend, record.precision))
        != Arithmetic(found.backend, found.precision_to_score(record.precision))
    }
    if others:
        log.warning(
            f"{found} scores models that {' and '.join(sorted(others))} calibrated: a few decisions near the threshold "
            "may differ; where that matters, fit on the kind of machine that scores, or give the --backend of the fit"
        )
    return found
