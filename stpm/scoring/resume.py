"""Resume the run that an output folder holds, or start one: fix the images and the models of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from stpm import storage
from stpm.errors import (
    DataError,
    ModelDamagedError,
    ModelError,
    NoModelError,
    OtherRunError,
    RunDamagedError,
    join_first,
)
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.scoring.inputs.manifest import Manifest, read_manifest, write_manifest
from stpm.scoring.run_state import RunState
from stpm.scoring.scoring_run import ModelRecords, ScoringRun

log = logging.getLogger(__name__)


def resume_or_start(run: ScoringRun, *, start_over: bool, replace: bool) -> tuple[RunState, Manifest, ModelRecords]:
    """Resume the run that the output holds, or start one: fix its manifest and its models.

    Raises:
        StpmError: as `stpm.scoring.run.run_scoring` does.
    """
    state = run.output.state
    manifest, models = (None if start_over else _resume(run, state, replace=replace)) or _start(run, state)
    state.bind_models(_model_ids(models), run.store.uri)
    if decided := [f"{name} {record.decision}" for name, record in models.items() if record.decision]:
        log.info(f"thresholds that --false-alarm-rate does not change: {join_first(decided)}")
    return state, manifest, models


def _resume(run: ScoringRun, state: RunState, *, replace: bool) -> tuple[Manifest, ModelRecords] | None:
    """Read the manifest and the models of the run that the output holds; None if a new run is to be started."""
    differences = state.config_differences(run.config)
    if not differences:
        # An unfinished run goes on with its models, even if newer ones are current.
        model_ids = None if replace or state.is_finished() else state.record.models
        manifest, models = _read_inputs(run, state, model_ids)
        differences = state.model_differences(_model_ids(models))
        if not differences:
            if model_ids:
                log.info("the models are those that this run began with, even if others became current since")
            return manifest, models
    # A run without rows may be replaced, and one whose removal was cut off. `clear` keeps rows without a run.json.
    if state.record.config and not replace and run.output.files():
        raise OtherRunError(f"{run.output.folder} holds the rows of another run: {join_first(differences)}")
    return None


def _start(run: ScoringRun, state: RunState) -> tuple[Manifest, ModelRecords]:
    """Remove what earlier runs wrote, and write the manifest.

    Keep the rows of an earlier run if this one could not be made: list all images, and read their models, first.
    """
    if run.output.files():
        categories = {name for rows in run.rows() for name in rows["category"].unique().to_pylist()}
        read_models(run.store, categories)
    run.output.clear()
    state.start(run.config)
    return _read_inputs(run, state)


def _read_inputs(
    run: ScoringRun, state: RunState, model_ids: Mapping[str, str] | None = None
) -> tuple[Manifest, ModelRecords]:
    folder = run.output.manifest
    manifest = read_manifest(folder) or write_manifest(
        run.rows(), folder, run.options.segment_rows, state.next_attempt(), run.output.fence
    )
    log.info(manifest.describe())
    return manifest, read_models(run.store, manifest.categories, model_ids)


def read_models(
    store: ModelStore, categories: Iterable[str], model_ids: Mapping[str, str] | None = None
) -> ModelRecords:
    """Read the records of the models of those categories that have one.

    Args:
        categories: names; "" is ignored.
        model_ids: the model of each category, and of no other; None: the current ones.
    """

    def read(category: str) -> ModelRecord | str:
        """Return the record, or why there is none."""
        try:
            return store.record(category, (model_ids or {}).get(category, ""))
        except (NoModelError, DataError) as error:
            # Do not catch the errors of damaged or unreadable models: a row without a model is never scored again.
            return str(error)
        except ModelDamagedError as error:
            if not model_ids:
                raise
            raise RunDamagedError(f"{error}; this run began with that model") from error

    names = [name for name in categories if name and (model_ids is None or name in model_ids)]
    found = dict(zip(names, storage.in_parallel(read, names), strict=True))
    models = {name: each for name, each in found.items() if not isinstance(each, str)}
    problems = [each for each in found.values() if isinstance(each, str)]
    if not models:
        raise ModelError(join_first(problems) or "no image has a category; see --category and --category-from")
    if problems:
        log.warning(f"no model for {len(problems)} of {len(names)} categories: {join_first(problems)}")
    return models


def _model_ids(models: ModelRecords) -> dict[str, str]:
    return {category: record.model_id for category, record in models.items()}
