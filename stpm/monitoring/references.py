"""The model that each category of a night is compared with, and its good images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from stpm import storage
from stpm.errors import ModelDamagedError, ModelUnreadableError
from stpm.models.store import ModelStore
from stpm.monitoring.drift import Reference
from stpm.monitoring.nights import Night
from stpm.monitoring.rows import RowCounter
from stpm.names import as_utf8
from stpm.scoring.output import RunOutput


class ModelReference(NamedTuple):
    """The good images of a category's model, or why there are none.

    Args:
        reference: None if there is none.
        problem: why there is none, for people; "" if there is one.
    """

    reference: Reference | None
    problem: str


def choose_models(
    rows: Mapping[str, RowCounter], outputs: Iterable[RunOutput], earlier: Iterable[Night]
) -> dict[str, str]:
    """Return the id of each category's model, by name in order; "" if it has none.

    It is the model that scored most of the category's rows; without any, that of the latest run or night that has one.
    """
    scored = {name: counted.models.most_common(1)[0][0] for name, counted in rows.items() if counted.models}
    models = dict.fromkeys(rows, "") | _latest_models(earlier) | _bound_models(outputs) | scored
    return dict(sorted(models.items()))


def load_references(store: ModelStore, models: Mapping[str, str]) -> tuple[dict[str, ModelReference], str]:
    """Read the good images of each category's model.

    Args:
        store: the models.
        models: the id of each category's model; "" if it has none.

    Returns:
        The good images by category, and the problem if storage failed: then no category has a reference, and the next
        start judges the night.
    """
    try:
        found = storage.in_parallel(lambda name: _load_reference(store, name, models[name]), list(models))
    except ModelUnreadableError as error:
        problem = as_utf8(str(error))
        return dict.fromkeys(models, ModelReference(None, problem)), problem
    return dict(zip(models, found, strict=True)), ""


def _bound_models(outputs: Iterable[RunOutput]) -> dict[str, str]:
    """Return the id of each category's model in the latest run that has one."""
    bound: dict[str, str] = {}
    for output in outputs:
        bound |= output.state.model_ids() or {}
    return bound


def _latest_models(earlier: Iterable[Night]) -> dict[str, str]:
    """Return the latest model of each category that had scores on one of the earlier nights."""
    records = (item for night in earlier for item in night.categories.items())
    return {name: record.model_id for name, record in records if record.scored}


def _load_reference(store: ModelStore, category: str, model_id: str) -> ModelReference:
    """Read the good images of a category's model.

    Raises:
        ModelUnreadableError: if storage failed.
    """
    if not model_id:
        reason = "no model scored its images" if category else "images without a category, which no model scores"
        return ModelReference(None, reason)
    try:
        record = store.record(category, model_id)
        table = store.image_statistics(record)
        is_added = store.calibration_scores(record)["is_added"].to_numpy()
    except ModelDamagedError as error:
        return ModelReference(None, f"its model cannot be read: {error}")
    statistics = {name: table[name].to_numpy() for name in table.column_names}
    return ModelReference(Reference(len(is_added), statistics, np.flatnonzero(is_added[::-1]) + 1.0), "")
