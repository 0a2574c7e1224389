"""The most anomalous images of a night, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from stpm import storage
from stpm.errors import ModelError
from stpm.method.preprocessing import Preprocessing
from stpm.models.store import ModelStore
from stpm.monitoring.nights import TopImage
from stpm.scoring.output import RunOutput
from stpm.scoring.ranked_rows import most_anomalous
from stpm.scoring.triage import THREADS, picture

_COUNT = 12


def top_images(outputs: Sequence[RunOutput], store: ModelStore) -> tuple[TopImage, ...]:
    """Select the most anomalous images of a night, and draw each with its heatmap.

    Args:
        outputs: of the night's runs.
        store: the models, which say how an image was cut for its heatmap.
    """
    found = [(row["margin"], row["uri"], output, row) for output in outputs for row in most_anomalous(output, _COUNT)]
    best = sorted(found, key=lambda item: item[:2], reverse=True)[:_COUNT]

    @cache
    def preprocessing(category: str, model_id: str) -> Preprocessing:
        return store.record(category, model_id).preprocessing

    def image(output: RunOutput, row: dict[str, Any]) -> TopImage:
        drawn = ""
        with suppress(ModelError):
            drawn = picture(output, row, preprocessing(row["category"], row["model_id"]))
        values = {name: row[name] for name in ("uri", "category", "score", "threshold", "p_value", "is_anomalous")}
        return TopImage(**values, picture=drawn)

    return tuple(storage.in_parallel(lambda item: image(*item[2:]), best, THREADS))
