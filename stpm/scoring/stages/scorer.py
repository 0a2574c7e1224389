"""Second stage: the actor that holds teachers and models."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from stpm.data.images import SUSPECT_ERRORS, TRANSIENT_ERRORS
from stpm.errors import ImageError, ModelError, ModelUnreadableError
from stpm.method.forward import Matcher, pick_device
from stpm.method.fusion import AnomalyMap
from stpm.models.record import ModelRecord
from stpm.models.store import Model, ModelStore
from stpm.scoring import prometheus as meters
from stpm.scoring.progress import ProgressReporter
from stpm.scoring.run_statistics import RunStatistics, UnfinishedImage
from stpm.scoring.schema import DECODED, SCORED, table, with_passthrough
from stpm.scoring.stages.scorer_actor import LARGEST_BATCH

FIRST_BATCH = 16
_WORTH_IT = 1.05
# Seconds until a model that could not be loaded is tried again.
_TRIED_AGAIN_AFTER = 60.0
# Columns whose values the scorer looks at, or changes; others go through as they are.
_READ = ("category", "width", "height", "error_kind", "error_message")

Sharing = tuple[str, ...]

log = logging.getLogger(__name__)


class Scorer:
    """DECODED rows to SCORED rows. The teacher runs once per forward pass, each model on its own rows.

    A model that cannot be loaded makes its rows errors, and no others. Rows with a transient error are left out: what
    is not written is tried again by the next run.

    Args:
        store: URI of the model store.
        false_alarm_rate: for the threshold.
        raw_maps: keep the anomaly maps.
        overlays: keep the pixels, for what is drawn over them.
        batch_size: images per forward pass; 0: found on the device.
        memory: bytes of models that are kept loaded.
        threads: that torch may use on a CPU; 0: as many as Ray assigned CPUs to this actor, at least one.
        report: told of each batch, and how long it took; None tells nobody.
        model_ids: the model that scores each category's rows, and no other; None: those that are current.
        accept_errors: keep rows with a transient error too.
    """

    def __init__(
        self,
        store: str,
        false_alarm_rate: float,
        raw_maps: bool,
        overlays: bool,
        batch_size: int = 0,
        memory: int = 2**30,
        threads: int = 0,
        report: ProgressReporter | None = None,
        model_ids: Mapping[str, str] | None = None,
        accept_errors: bool = False,
    ) -> None:
        self._left_out = frozenset() if accept_errors else frozenset(TRANSIENT_ERRORS)
        self._model_ids = model_ids
        assigned = ray.get_runtime_context().get_assigned_resources().get("CPU", 1) if ray.is_initialized() else 1
        torch.set_num_threads(threads or max(int(assigned), 1))
        self._store = ModelStore(store)
        self._rate = false_alarm_rate
        self._report = report
        self._raw_maps = raw_maps
        self._overlays = overlays
        self._device = pick_device()
        self._batch = BatchSize(batch_size, grows=self._device.type != "cpu")
        self._records: dict[str, ModelRecord] = {}
        self._failures: dict[str, tuple[ModelError, float]] = {}
        self._models = LoadedModels(self._store, self._device, memory)
        self._matchers: dict[Sharing, Matcher] = {}
        # A GPU is taken for as long as it takes; of a CPU others have their share meanwhile.
        self._clock = time.process_time if self._device.type == "cpu" else time.perf_counter
        self._idle_since = 0.0

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self._idle_since:
            meters.count_wait_seconds(time.perf_counter() - self._idle_since)
        start = self._clock()
        rows = batch.num_rows
        columns: dict[str, Any] = {name: batch[name] for name in DECODED.names}
        columns |= {name: batch[name].to_pylist() for name in _READ}
        for field in SCORED:
            if field.name not in columns:
                columns[field.name] = [None if field.nullable else b"" if field.name == "heat" else ""] * rows
        good: list[tuple[Sharing, str, int]] = []
        records: dict[Sharing, ModelRecord] = {}
        for i in range(rows):
            if columns["error_kind"][i]:
                continue
            category = columns["category"][i]
            if self._model_ids is not None and category not in self._model_ids:
                missing = ModelError(f"{self._store.uri}: category {category!r} had no model when this run began")
                _fail(columns, [i], "no_model", missing)
                continue
            record = self._record(category)
            if isinstance(record, ModelError):
                _fail(columns, [i], _model_kind(record), record)
            else:
                sharing = _sharing(record)
                records[sharing] = record
                good.append((sharing, category, i))
        # Sorted by teacher and then by category, what one network sees is a slice and never a copy.
        for sharing, shared in groupby(sorted(good), key=lambda row: row[0]):
            members = [i for _, _, i in shared]
            try:
                matcher = self._matcher(sharing, records[sharing])
            except ModelError as error:
                _fail(columns, members, _model_kind(error), error)
            else:
                self._score_shared(matcher, members, columns)
        if not self._overlays:
            columns["pixels"] = [b""] * rows
        result = with_passthrough(table(columns, SCORED), batch)
        computed = self._clock() - start
        meters.count_stage_seconds("forward", computed)
        self._tell(batch["uri"], batch["error_kind"].to_pylist(), columns, computed)
        self._idle_since = time.perf_counter()
        kept = [kind not in self._left_out for kind in columns["error_kind"]]
        return result if all(kept) else result.filter(pa.array(kept))

    def _tell(self, uris: pa.ChunkedArray, arrived: list[str], columns: dict[str, Any], seconds: float) -> None:
        """Report a batch that arrived with such errors and took so many seconds, the rows that are left out too."""
        kinds, messages = columns["error_kind"], columns["error_message"]
        left = [i for i, kind in enumerate(kinds) if kind in self._left_out]
        meters.count_images((columns["category"][i], kinds[i], False) for i in left)
        if self._report:
            tried = [i for i, before in enumerate(arrived) if not before]
            statistics = RunStatistics(
                len(kinds), sum(map(bool, kinds)), sum(map(bool, columns["is_anomalous"])), forward_seconds=seconds
            )
            errors = [f"{kinds[i]}: {messages[i]}" for i in tried if kinds[i] in SUSPECT_ERRORS]
            unfinished = [UnfinishedImage(uris[i].as_py(), kinds[i], messages[i]) for i in left]
            self._report("forward", statistics, len(tried), errors, unfinished)

    def _score_shared(self, matcher: Matcher, rows: list[int], columns: dict[str, Any]) -> None:
        """Rows whose models share a teacher and all that the forward pass depends on."""
        start = 0
        while start < len(rows):
            part = rows[start : start + self._batch.now]
            began = time.perf_counter()
            try:
                self._forward(matcher, part, columns)
            except torch.cuda.OutOfMemoryError as error:
                torch.cuda.empty_cache()
                if len(part) > 1:
                    self._batch.halve(len(part))
                    continue
                _fail(columns, part, "out_of_memory", error)
            except Exception:
                log.exception("a forward pass failed; its images are tried one by one")
                self._score_singly(matcher, part, columns)
            self._batch.ran(len(part), time.perf_counter() - began)
            start += len(part)

    def _score_singly(self, matcher: Matcher, rows: list[int], columns: dict[str, Any]) -> None:
        for row in rows:
            try:
                self._forward(matcher, [row], columns)
            except Exception as error:
                log.exception("image %s", columns["image_id"][row])
                _fail(columns, [row], "forward_failed", error)

    @torch.inference_mode()
    def _forward(self, matcher: Matcher, rows: list[int], columns: dict[str, Any]) -> None:
        preprocessing = matcher.preprocessing
        pixels = np.stack([np.frombuffer(columns["pixels"][i].as_buffer(), np.uint8) for i in rows])
        pixels = pixels.reshape(len(rows), preprocessing.height, preprocessing.width, 3)
        inputs = matcher.inputs(torch.from_numpy(pixels))
        content = preprocessing.content_boxes((columns["width"][i], columns["height"][i]) for i in rows)
        teacher = matcher.features(matcher.teacher, inputs)
        start = 0
        for category, group in groupby(rows, key=lambda i: columns["category"][i]):
            members = list(group)
            part = slice(start, start + len(members))
            start = part.stop
            try:
                model = self._models.get(self._records[category])
            except ModelError as error:
                self._failures[category] = error, time.monotonic()
                _fail(columns, members, _model_kind(error), error)
                continue
            distances = matcher.distances(model.parts, [t[part] for t in teacher], inputs[part], content[part])
            record = model.record
            maps = matcher.anomaly_maps(distances, content[part], record.recipe.fusing, record.part_scales)
            self._fill(members, maps, model, columns)

    def _fill(self, rows: Sequence[int], maps: Sequence[AnomalyMap], model: Model, columns: dict[str, Any]) -> None:
        record, calibration = model.record, model.calibration
        found = [each.score(record.recipe.top_fraction) for each in maps]
        scores = np.array([score.total for score in found], np.float32)
        p_values = calibration.p_values(scores)
        threshold = np.float32(calibration.threshold(self._rate))
        for k, row in enumerate(rows):
            each, score = maps[k].total, scores[k]
            y, x = divmod(int(each.argmax()), each.shape[1])
            columns["score"][row] = float(score)
            columns["student_score"][row] = found[k].student
            columns["memory_score"][row] = found[k].memory
            columns["p_value"][row] = float(p_values[k])
            columns["is_anomalous"][row] = bool(score > threshold)
            columns["threshold"][row] = float(threshold)
            columns["peak_x"][row], columns["peak_y"][row] = record.preprocessing.to_original(
                x, y, columns["width"][row], columns["height"][row]
            )
            columns["area"][row] = float((each > threshold).mean())
            columns["seed"][row] = record.recipe.seed
            columns["model_id"][row] = record.model_id
            columns["heat"][row] = calibration.scale.apply(each).data.cast("B")
            if self._raw_maps:
                columns["anomaly_map"][row] = each.data.cast("B")

    def _record(self, category: str) -> ModelRecord | ModelError:
        """What is known of a category's model, or why there is none."""
        failure, since = self._failures.get(category, (None, 0.0))
        if failure and time.monotonic() - since < _TRIED_AGAIN_AFTER:
            return failure
        if category not in self._records:
            try:
                model_id = self._model_ids[category] if self._model_ids else ""
                self._records[category] = self._store.record(category, model_id)
            except ModelError as error:
                self._failures[category] = error, time.monotonic()
                return error
        return self._records[category]

    def _matcher(self, sharing: Sharing, record: ModelRecord) -> Matcher:
        if sharing not in self._matchers:
            teacher = self._store.load_teacher(record.recipe.teacher, record.recipe.levels, record.teacher_digest)
            self._matchers[sharing] = Matcher(teacher, record.preprocessing, self._device, record.precision)
        return self._matchers[sharing]


class LoadedModels:
    """Models by category, those kept that were used last.

    Args:
        store: where they come from.
        device: where they go.
        memory: bytes of weights that are kept; the one in use always is.
    """

    def __init__(self, store: ModelStore, device: torch.device, memory: int) -> None:
        self._store = store
        self._device = device
        self._memory = memory
        self._models: OrderedDict[str, Model] = OrderedDict()
        self._sizes: dict[str, int] = {}

    def get(self, record: ModelRecord) -> Model:
        """Raises ModelError if it cannot be loaded."""
        category = record.category
        if category not in self._models:
            model = self._store.load(category, record.model_id).to(self._device)
            self._models[category] = model
            self._sizes[category] = model.parts.nbytes
            while len(self._models) > 1 and sum(self._sizes.values()) > self._memory:
                oldest, _ = self._models.popitem(last=False)
                del self._sizes[oldest]
        self._models.move_to_end(category)
        return self._models[category]


class BatchSize:
    """Images per forward pass: as given, or doubled while that is faster; halved where memory runs out.

    Args:
        wanted: the number; 0: to be found.
        grows: the device gains by more than a few; a CPU does not.
    """

    def __init__(self, wanted: int, grows: bool) -> None:
        self.now = wanted or FIRST_BATCH
        self._settled = bool(wanted) or not grows
        self._best = 0.0
        self._warm = False

    def ran(self, images: int, seconds: float) -> None:
        """So many images took so long."""
        if self._settled or images < self.now:
            return
        if not self._warm:
            # The first pass of a size pays for choosing its kernels.
            self._warm = True
            return
        speed = images / seconds
        self._warm = False
        if speed < self._best * _WORTH_IT:
            self.now //= 2
            self._settled = True
        elif self.now * 2 > LARGEST_BATCH:
            self._settled = True
        else:
            self._best = speed
            self.now *= 2

    def halve(self, failed: int) -> None:
        """So many images were too many."""
        self.now = max(failed // 2, 1)
        self._settled = True


def _fail(columns: dict[str, Any], rows: Sequence[int], kind: str, error: Exception) -> None:
    message = str(ImageError(kind, str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"))
    for i in rows:
        columns["error_kind"][i], columns["error_message"][i] = kind, message


def _model_kind(error: ModelError) -> str:
    """Whether storage did not give a model, or what it gave is not the model."""
    return "model_unreadable" if isinstance(error, ModelUnreadableError) else "model_damaged"


def _sharing(record: ModelRecord) -> Sharing:
    """What models must have in common to share one forward pass of the teacher."""
    recipe = record.recipe
    return (
        record.teacher_digest,
        ",".join(map(str, recipe.levels)),
        str(record.preprocessing),
        record.precision,
    )
