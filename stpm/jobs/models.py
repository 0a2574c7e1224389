"""The models job: list models and thresholds, take down decisions, roll back and forward, and remove old models."""

from __future__ import annotations

import dataclasses
import getpass
import logging
from collections.abc import Mapping
from contextlib import nullcontext

from tabulate import tabulate

from stpm import storage
from stpm.console import log_lines, visible
from stpm.errors import ConfigError, DataError, ModelError
from stpm.exit_codes import exit_code
from stpm.lease import hold_lease
from stpm.method.calibration import describe_promise
from stpm.models.options import ModelsOptions
from stpm.models.record import Decision
from stpm.models.store import ModelStore
from stpm.times import timestamp

log = logging.getLogger(__name__)

_COUNTS = ["good images", "added", "calibrate", "validation loss", "threshold"]
# The last two are left out where no model has any.
_HEAD = ["model", "", "created", *_COUNTS, "decided by", "problem"]
_ALIGN = [*["left"] * 3, *["right"] * len(_COUNTS), *["left"] * 2]


def run_models(options: ModelsOptions) -> int:
    """Run the models job; return its exit code: 0 all done, 2 some categories failed, 3 all of them.

    Raises:
        ConfigError: if another run holds the store, or it is not known who decides.
        DataError: if there is no store.
    """
    store = ModelStore(options.models)
    changes = bool(options.threshold) or options.roll_back or options.roll_forward or options.keep > 0
    try:
        by = options.by or getpass.getuser() if options.threshold else ""
    except (KeyError, OSError) as error:
        raise ConfigError("--by is missing, and this process has no login name; say who decides") from error
    decisions = {
        category: None if value is None else Decision(value, by, options.because)
        for category, value in options.decisions.items()
    }
    if not storage.exists(store.uri):
        raise DataError(f"{store.uri}: no such folder; give the --models of the fit job")
    categories = options.wanted or store.categories()
    if not categories:
        raise DataError(f"{store.uri}: no category has a model there; fit one with stpm fit")
    failed = set()
    with hold_lease(storage.output_folder(options.models), options.wait) if changes else nullcontext():
        for category in categories:
            try:
                _change(store, category, options, decisions)
            except (DataError, ModelError) as error:
                failed.add(category)
                log.error(f"{category}: failed: {error}", extra={"category": category})
    done = [category for category in categories if category not in failed]
    if done:
        lines = [line for category in done for line in _describe(store, category, options.false_alarm_rate)]
        columns = [i for i in range(len(_HEAD)) if i < len(_HEAD) - 2 or any(line[i] for line in lines)]
        head, align, *shown = ([line[i] for i in columns] for line in (_HEAD, _ALIGN, *lines))
        log_lines(tabulate(shown, head, disable_numparse=True, colalign=align))
    if options.thresholds or options.page or options.labelled:
        # It imports matplotlib, which takes a second.
        from stpm.evaluation.thresholds import show_thresholds

        failed |= show_thresholds(store, done, options)
    return exit_code(len(categories) - len(failed), len(failed))


def _decide(store: ModelStore, category: str, decision: Decision | None, false_alarm_rate: float) -> None:
    """Publish the current model with a decision, or without one, and say what that changes."""
    versions = store.versions(category)
    before = store.record(category, versions.current.model_id)
    if not (decision or before.decision):
        # There is nothing to undo: a roll-back would go to another model.
        _log(category, "no decision is to be taken back")
        return
    after = dataclasses.replace(before, decision=decision, created=timestamp())
    if replaced := versions.describe_replaced(after.model_id):
        _log(category, replaced)
    store.save(after, store.read_files(before), versions.current.data_fingerprint)
    scores = store.calibration_scores(before)["score"].to_numpy()
    limit = after.threshold(scores, false_alarm_rate)
    was, now = (each.decision or "what the false-alarm rate of a run makes it" for each in (before, after))
    _log(
        category,
        f"the threshold is {now}; it was {was}. {describe_promise(scores, limit)}. Runs that have begun keep "
        f"theirs. To undo this: {store.roll_command(category, '--roll-back')}",
    )


def _change(store: ModelStore, category: str, options: ModelsOptions, decisions: Mapping[str, Decision | None]) -> None:
    """Make the changes that the options ask for in one category. Raises ModelError if one is not possible."""
    if category in decisions:
        _decide(store, category, decisions[category], options.false_alarm_rate)
    before = versions = store.versions(category)
    if options.roll_back:
        versions = versions.roll_back()
    if options.roll_forward:
        versions = versions.roll_forward()
    if versions != before:
        # A damaged model does not become current.
        store.read_files(store.record(category, versions.current.model_id))
        store.set_versions(category, versions)
        _log(category, f"the current model is {versions.current.model_id}, it was {before.current.model_id}")
    if options.keep:
        versions = versions.forget(options.keep)
        store.set_versions(category, versions)
        for model_id in store.model_folders(category):
            if not versions.position(model_id):
                store.remove(category, model_id)
                _log(category, f"removed {model_id}")


def _log(category: str, message: str) -> None:
    log.info(f"{category}: {message}", extra={"category": category})


def _describe(store: ModelStore, category: str, false_alarm_rate: float) -> list[list[str]]:
    """Make a line for each model of a category, by time: its place among the versions, its fit, and its threshold."""
    versions = store.versions(category)
    lines = []
    for model_id in store.model_ids(category):
        try:
            record = store.record(category, model_id)
            scores = store.calibration_scores(record)["score"].to_numpy()
        except ModelError as error:
            lines.append([model_id, versions.position(model_id), *[""] * 7, str(error)])
            continue
        fit = record.fit
        loss = "" if fit.validation_loss is None else f"{fit.validation_loss:.4f}"
        counts = [str(record.good_count), str(len(record.added_images) or ""), str(fit.calibration_count)]
        limit, by = f"{record.threshold(scores, false_alarm_rate):.4g}", ""
        if made := record.decision:
            limit, by = f"{made.threshold:.9g}", visible(" ".join(filter(None, [made.by, made.at, made.because])))
        lines.append([model_id, versions.position(model_id), record.created, *counts, loss, limit, by, ""])
    return sorted(lines, key=lambda line: line[2])
