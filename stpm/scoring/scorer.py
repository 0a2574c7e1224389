"""Second stage: the actor that holds teachers and students."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch

from stpm.errors import ModelError
from stpm.forward import Matcher, compare, pick_device
from stpm.models import Model, ModelRecord, ModelStore
from stpm.scoring.schema import DECODED, SCORED, table, with_carried

Sharing = tuple[str, ...]


class Scorer:
    """DECODED rows to SCORED rows. The teacher runs once per batch, each student on its own rows.

    A model that cannot be loaded makes its rows errors, and no others.

    Args:
        store: URI of the model store.
        false_alarm_rate: for the threshold.
        raw_maps: keep the anomaly maps.
        threads: that torch may use on a CPU; 0: as many as Ray assigned CPUs to this actor, at least one.
    """

    def __init__(self, store: str, false_alarm_rate: float, raw_maps: bool, threads: int = 0) -> None:
        assigned = ray.get_runtime_context().get_assigned_resources().get("CPU", 1) if ray.is_initialized() else 1
        torch.set_num_threads(threads or max(int(assigned), 1))
        self._store = ModelStore(store)
        self._rate = false_alarm_rate
        self._raw_maps = raw_maps
        self._device = pick_device()
        self._models: dict[str, Model | ModelError] = {}
        self._matchers: dict[Sharing, Matcher] = {}

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.num_rows
        columns: dict[str, list[Any]] = {name: batch[name].to_pylist() for name in DECODED.names}
        for field in SCORED:
            if field.name not in columns:
                columns[field.name] = [None if field.nullable else b"" if field.name == "heat" else ""] * rows
        good: list[tuple[Sharing, str, int]] = []
        for i in range(rows):
            if columns["error_kind"][i]:
                continue
            category = columns["category"][i]
            model = self._model(category)
            if isinstance(model, ModelError):
                columns["error_kind"][i], columns["error_message"][i] = "no_model", str(model)
            else:
                good.append((_sharing(model.record), category, i))
        # Sorted by teacher and then by category, what one network sees is a slice and never a copy.
        for sharing, shared in groupby(sorted(good), key=lambda row: row[0]):
            self._score_shared(self._matchers[sharing], [i for _, _, i in shared], columns)
        return with_carried(table(columns, SCORED), batch)

    def _score_shared(self, matcher: Matcher, rows: list[int], columns: dict[str, list[Any]]) -> None:
        """Rows whose models share a teacher and all that the forward pass depends on."""
        size = matcher.recipe.size
        pixels = np.stack([np.frombuffer(columns["pixels"][i], np.uint8).reshape(size, size, 3) for i in rows])
        with torch.inference_mode():
            inputs = matcher.inputs(torch.from_numpy(pixels))
            teacher = matcher.features(matcher.teacher, inputs)
            start = 0
            for category, group in groupby(rows, key=lambda i: columns["category"][i]):
                members = list(group)
                part = slice(start, start + len(members))
                model = self._loaded(category)
                student = matcher.features(model.student, inputs[part])
                maps = matcher.anomaly_maps(compare([t[part] for t in teacher], student), model.statistics)
                self._fill(members, maps, model, columns)
                start = part.stop

    def _fill(
        self, rows: Sequence[int], maps: npt.NDArray[np.float32], model: Model, columns: dict[str, list[Any]]
    ) -> None:
        flat = maps.reshape(len(rows), -1)
        peaks = flat.argmax(axis=1)
        scores = flat[np.arange(len(rows)), peaks]
        threshold = np.float32(model.calibration.threshold(self._rate))
        p_values = model.calibration.p_values(scores)
        heat = model.calibration.scale.apply(maps)
        size = maps.shape[-1]
        for k, row in enumerate(rows):
            y, x = divmod(int(peaks[k]), size)
            columns["score"][row] = float(scores[k])
            columns["p_value"][row] = float(p_values[k])
            columns["is_anomalous"][row] = bool(scores[k] > threshold)
            columns["threshold"][row] = float(threshold)
            columns["peak_x"][row], columns["peak_y"][row] = model.record.recipe.view.to_original(
                x, y, columns["width"][row], columns["height"][row]
            )
            columns["area"][row] = float((flat[k] > threshold).mean())
            columns["seed"][row] = model.record.recipe.seed
            columns["model_id"][row] = model.record.model_id
            columns["heat"][row] = heat[k].tobytes()
            if self._raw_maps:
                columns["anomaly_map"][row] = maps[k].tobytes()

    def _model(self, category: str) -> Model | ModelError:
        """The model, with its matcher made ready; or why there is none."""
        if category not in self._models:
            try:
                model = self._store.load(category).to(self._device)
                self._make_matcher(model.record)
                self._models[category] = model
            except ModelError as error:
                self._models[category] = error
        return self._models[category]

    def _loaded(self, category: str) -> Model:
        model = self._model(category)
        if isinstance(model, ModelError):
            raise model
        return model

    def _make_matcher(self, record: ModelRecord) -> None:
        sharing = _sharing(record)
        if sharing not in self._matchers:
            teacher = self._store.load_teacher(record.recipe.teacher, record.recipe.levels, record.teacher_digest)
            self._matchers[sharing] = Matcher(teacher, record.recipe, self._device, record.precision)


def _sharing(record: ModelRecord) -> Sharing:
    """What models must have in common to share one forward pass of the teacher."""
    recipe = record.recipe
    return (
        record.teacher_digest,
        ",".join(map(str, recipe.levels)),
        str(recipe.size),
        recipe.normalisation,
        recipe.combine,
        record.precision,
    )
