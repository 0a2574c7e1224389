"""The models job: list the models of a store, roll back and forward, and remove old models."""

from __future__ import annotations

import logging
from contextlib import nullcontext

from tabulate import tabulate

from stpm import storage
from stpm.console import log_lines
from stpm.errors import DataError, ModelError
from stpm.exit_codes import exit_code
from stpm.lease import hold_lease
from stpm.method.calibration import threshold
from stpm.models.options import ModelsOptions
from stpm.models.store import ModelStore

log = logging.getLogger(__name__)

_HEAD = ["model", "", "created", "good images", "added", "calibrate", "validation loss", "threshold", "problem"]
_ALIGN = [*["left"] * 3, *["right"] * 5, "left"]


def run_models(options: ModelsOptions) -> int:
    """Run the models job; return its exit code: 0 all done, 2 some categories failed, 3 all of them.

    Raises:
        ConfigError: if another run holds the store.
        DataError: if there is no store.
    """
    store = ModelStore(options.models)
    changes = options.roll_back or options.roll_forward or options.keep > 0
    if not storage.exists(store.uri):
        raise DataError(f"{store.uri}: no such folder; give the --models of the fit job")
    categories = list(dict.fromkeys(options.categories)) if options.names_categories else store.categories()
    if not categories:
        raise DataError(f"{store.uri}: no category has a model there; fit one with stpm fit")
    failed = set()
    with hold_lease(storage.output_folder(options.models), options.wait) if changes else nullcontext():
        for category in categories:
            try:
                _change(store, category, options)
            except (DataError, ModelError) as error:
                failed.add(category)
                log.error(f"{category}: failed: {error}", extra={"category": category})
    done = [category for category in categories if category not in failed]
    if done:
        lines = [line for category in done for line in _describe(store, category, options.false_alarm_rate)]
        columns = len(_HEAD) if any(line[-1] for line in lines) else len(_HEAD) - 1
        shown = [line[:columns] for line in lines]
        log_lines(tabulate(shown, _HEAD[:columns], disable_numparse=True, colalign=_ALIGN[:columns]))
    return exit_code(len(done), len(failed))


def _change(store: ModelStore, category: str, options: ModelsOptions) -> None:
    """Make the changes that the options ask for in one category. Raises ModelError if one is not possible."""
    before = versions = store.versions(category)
    if options.roll_back:
        versions = versions.roll_back()
    if options.roll_forward:
        versions = versions.roll_forward()
    if versions != before:
        # A damaged model does not become current.
        store.read_files(store.record(category, versions.current.model_id))
        store.set_versions(category, versions)
        log.info(
            f"{category}: the current model is {versions.current.model_id}, it was {before.current.model_id}",
            extra={"category": category},
        )
    if options.keep:
        versions = versions.forget(options.keep)
        store.set_versions(category, versions)
        for model_id in store.model_folders(category):
            if not versions.position(model_id):
                store.remove(category, model_id)
                log.info(f"{category}: removed {model_id}", extra={"category": category})


def _describe(store: ModelStore, category: str, false_alarm_rate: float) -> list[list[str]]:
    """Make a line for each model of a category, by time: its place among the versions, its fit, and its threshold."""
    versions = store.versions(category)
    lines = []
    for model_id in store.model_ids(category):
        try:
            record = store.record(category, model_id)
            scores = store.calibration_scores(record)["score"].to_numpy()
        except ModelError as error:
            lines.append([model_id, versions.position(model_id), *[""] * 6, str(error)])
            continue
        fit = record.fit
        loss = "" if fit.validation_loss is None else f"{fit.validation_loss:.4f}"
        counts = [str(record.good_count), str(len(record.added_images) or ""), str(fit.calibration_count)]
        limit = f"{threshold(scores, false_alarm_rate):.4g}"
        lines.append([model_id, versions.position(model_id), record.created, *counts, loss, limit, ""])
    return sorted(lines, key=lambda line: line[2])
