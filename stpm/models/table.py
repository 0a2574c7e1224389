"""A table of the models of a store."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from stpm.errors import ModelError
from stpm.method.calibration import threshold
from stpm.models.store import ModelStore

_HEAD = ["model", "", "created", "good images", "added", "calibrate", "validation loss", "threshold", "problem"]


def models_table(store: ModelStore, categories: Sequence[str], false_alarm_rate: float) -> str:
    """Return a table with a line for each model, by category and time: its place among the versions, and its fit.

    Args:
        store: the store whose models are listed.
        categories: names of the categories to list.
        false_alarm_rate: rate in (0, 1) that the listed threshold is for.

    Raises:
        ModelError: if a category has no model.
    """
    lines = [line for category in categories for line in _lines(store, category, false_alarm_rate)]
    columns = len(_HEAD) if any(line[-1] for line in lines) else len(_HEAD) - 1
    return tabulate(
        [line[:columns] for line in lines],
        _HEAD[:columns],
        disable_numparse=True,
        colalign=(*["left"] * 3, *["right"] * 5, "left")[:columns],
    )


def _lines(store: ModelStore, category: str, false_alarm_rate: float) -> list[list[str]]:
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
