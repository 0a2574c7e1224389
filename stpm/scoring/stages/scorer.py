"""Second stage: score decoded images with the models of their categories.

The driver imports this module, so it does not import torch at the top.
"""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from stpm.cluster.device import assigned_device
from stpm.errors import RETRIED_ERRORS, DeviceError, ImageError, one_line
from stpm.method.arithmetic import Arithmetic
from stpm.models.store import ModelStore
from stpm.result import Request
from stpm.scoring import prometheus
from stpm.scoring.options import OutputOptions, ScoreOptions
from stpm.scoring.progress import BatchReport, ProgressReporter, WarningRelay
from stpm.scoring.run_statistics import RunStatistics, UnfinishedImage
from stpm.scoring.schema import DECODED, SCORED, error_columns, external_errors, table, with_passthrough
from stpm.scoring.scoring_run import ModelRecords
from stpm.scoring.stages.batch_size import BatchSize

if TYPE_CHECKING:
    import torch

    from stpm.method.teacher import Inputs, Teacher
    from stpm.result import Result
    from stpm.shared_teachers import TeacherSpec

log = logging.getLogger(__name__)

# Columns of SCORED that are fields of a result.
_COPIED = (
    *("score", "fine_score", "coarse_score", "p_value", "is_anomalous", "threshold", "area", "pixel_threshold"),
    *("regions", "region_count", "peak_features", "seed", "model_id"),
)
# Columns that a row with an error has, too.
_OF_ERROR = {"model_id": "", "heatmap_levels": b""}

# The columns of DECODED that the scorer reads, beside the pixels.
_READ = ("uri", "category", "width", "height", "inspected", "error_kind", "error_message")

# A row of DECODED: the columns above, and "pixels", which stay in Arrow's memory.
Row = Mapping[str, Any]
# The values of an image in the columns that SCORED adds to DECODED, or why it has none.
Outcome = Mapping[str, Any] | ImageError
# Of an image, in the last step of its batch: what its outcome is made of.
Finish = Callable[[], Sequence["Result | ImageError"]]
# A batch that is being scored: each step yields the outcomes that are ready, if there are any.
Steps = Iterator[list[Outcome]]


class Scorer:
    """Turn DECODED rows into SCORED rows. The teacher runs once per forward pass, each model on its own rows.

    The rows of a model that cannot be loaded become errors. Drop the rows with an error of RETRIED_ERRORS, unless the
    options accept them: the next run scores the images that have no row.

    As an actor of Ray it computes in as many threads as Ray assigned CPUs to it, at least one.

    Args:
        models: by category, of all images that are decoded.
        output: whether rows keep anomaly maps, and the pixels for overlays.
        arithmetic: what computes the features.
        progress: gets the report of each batch, and warnings. If torch cannot use the actor's GPU, it stops the run;
            the first batch then raises DeviceError, since of an actor that does not start Ray prints the traceback.
    """

    def __init__(
        self,
        store: ModelStore,
        models: ModelRecords,
        options: ScoreOptions,
        output: OutputOptions,
        arithmetic: Arithmetic,
        progress: ProgressReporter | None = None,
    ) -> None:
        import torch

        from stpm.method.device import device_capabilities
        from stpm.scoring.stages.detector_cache import DetectorCache

        self._options = options
        self._output = output
        self._request = Request(options.false_alarm_rate, options.region_rate, output.heatmaps, output.raw_maps)
        self._progress = progress
        self._idle_since = 0.0
        self._broken: DeviceError | None = None
        if ray.is_initialized() and progress:
            logging.getLogger("stpm").addHandler(WarningRelay(progress))
            torch.set_num_threads(max(int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)), 1))
        try:
            device = assigned_device()
        except DeviceError as error:
            if not progress:
                raise
            progress.stop(str(error))
            self._broken = error
            return
        if arithmetic.precision == "bfloat16" and not device_capabilities(device).has_bfloat16:
            # A node that came after the run had begun.
            log.warning("a node's device has no bfloat16, which the run computes in: there float32 computes, slower")
            arithmetic = replace(arithmetic, precision="float32")
        self._detectors = DetectorCache(store, models, device, arithmetic, int(options.model_ram_gib * 2**30))
        self._batch_size = BatchSize(options.scoring_batch_size, grows=device.type != "cpu")
        self._run = chain.from_iterable if device.type == "cpu" else overlap
        # Other processes share a CPU: count this one's time. A GPU is occupied all the time.
        self._clock = time.process_time if device.type == "cpu" else time.perf_counter

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self._broken:
            raise self._broken
        if self._idle_since:
            prometheus.count_wait_seconds(time.perf_counter() - self._idle_since)
        start = self._clock()
        images = batch.select(_READ).to_pylist()
        for image, pixels in zip(images, batch["pixels"], strict=True):
            image["pixels"] = pixels.as_buffer()
        outcomes, openvino_images = self._score(images)
        result = self._scored_table(batch, outcomes)
        seconds = self._clock() - start
        prometheus.count_stage_seconds("score", seconds)
        dropped = () if self._options.accept_errors else RETRIED_ERRORS
        unfinished = [
            UnfinishedImage(image["uri"], outcome.kind, str(outcome))
            if isinstance(outcome, ImageError) and outcome.kind in dropped
            else None
            for image, outcome in zip(images, outcomes, strict=True)
        ]
        prometheus.count_images(
            (image["category"], each.error_kind, False) for image, each in zip(images, unfinished, strict=True) if each
        )
        if self._progress:
            scored = [outcome for outcome in outcomes if not isinstance(outcome, ImageError)]
            statistics = RunStatistics(
                images=len(images),
                errors=len(images) - len(scored),
                anomalous=sum(values["is_anomalous"] for values in scored),
                openvino_images=openvino_images,
                score_seconds=seconds,
            )
            tried = [outcome for image, outcome in zip(images, outcomes, strict=True) if not image["error_kind"]]
            left = [each for each in unfinished if each]
            self._progress.report(BatchReport("score", statistics, len(tried), external_errors(tried), left))
        self._idle_since = time.perf_counter()
        return result.filter(pa.array([not each for each in unfinished])) if any(unfinished) else result

    def _score(self, images: Sequence[Row]) -> tuple[list[Outcome], int]:
        """Score the images that have no error yet, those with one teacher together; count those by OpenVINO.

        Load a teacher when it is the turn of its images: the memory may not hold the teachers of all of them.
        """
        outcomes: dict[int, Outcome] = {
            i: ImageError(image["error_kind"], image["error_message"])
            for i, image in enumerate(images)
            if image["error_kind"]
        }
        by_teacher: defaultdict[TeacherSpec, list[int]] = defaultdict(list)
        # Sort by category: the images of one model are then a slice of a batch, not a copy.
        for i in sorted(range(len(images)), key=lambda i: images[i]["category"]):
            if i not in outcomes:
                by_teacher[self._detectors.teacher_spec(images[i]["category"])].append(i)
        openvino_images = 0
        for spec, members in by_teacher.items():
            try:
                teacher = self._detectors.teacher(images[members[0]]["category"])
            except ImageError as error:
                outcomes |= dict.fromkeys(members, error)
                continue
            outcomes |= zip(members, self._score_shared(teacher, [images[i] for i in members]), strict=True)
            openvino_images += len(members) if spec.backend == "openvino" else 0
            # The next one may need its memory.
            del teacher
        return [outcomes[i] for i in range(len(images))], openvino_images

    def _score_shared(self, teacher: Teacher, images: Sequence[Row]) -> list[Outcome]:
        """Score images whose models share a teacher, batch by batch."""
        outcomes: list[Outcome] = []
        began = time.perf_counter()
        for scored in self._run(self._batches(teacher, images)):
            outcomes += scored
            if scored:
                self._batch_size.update(len(scored), time.perf_counter() - began)
                began = time.perf_counter()
        return outcomes

    def _batches(self, teacher: Teacher, images: Sequence[Row]) -> Iterator[Steps]:
        # A GPU's memory is not known to suffice either, but there a batch that does not fit is halved.
        most = teacher.preprocessing.batch_size if teacher.device.type == "cpu" else len(images)
        start = 0
        while start < len(images):
            batch = images[start : start + min(self._batch_size.current, most)]
            start += len(batch)
            yield self._score_batch(teacher, batch)

    def _score_batch(self, teacher: Teacher, batch: Sequence[Row]) -> Steps:
        """Score a batch. If a step fails, score its halves, so that only the images at fault become errors."""
        import torch

        from stpm.method.device import is_out_of_memory

        try:
            yield from torch.inference_mode()(self._forward)(teacher, batch)
        except Exception as error:
            log.exception("the forward pass of %d images from %s failed", len(batch), batch[0]["uri"])
            kind = "out_of_memory" if is_out_of_memory(error) else "forward_failed"
            if kind == "forward_failed" and teacher.device.type == "cuda":
                _end_with_broken_gpu()
            failure = ImageError(kind, one_line(error))
        else:
            return
        if len(batch) == 1:
            yield [failure]
            return
        if kind == "out_of_memory":
            torch.cuda.empty_cache()
            self._batch_size.halve(len(batch))
        halves = batch[: len(batch) // 2], batch[len(batch) // 2 :]
        # In one step: the next batch would take memory from them.
        yield [outcome for half in halves for scored in self._score_batch(teacher, half) for outcome in scored]

    def _forward(self, teacher: Teacher, images: Sequence[Row]) -> Steps:
        """Score images of one batch, sorted by category: launch, decide, make outcomes. The teacher runs once."""
        import torch

        pixels = np.stack([np.frombuffer(image["pixels"], np.uint8) for image in images])
        pixels = pixels.reshape(len(images), *teacher.preprocessing.input_shape, 3)
        inputs = teacher.inputs(torch.from_numpy(pixels))
        features = teacher(inputs)
        launched: list[Callable[[], Finish]] = []
        finishes: list[Finish] = []
        start = 0
        for category, group in groupby(images, key=lambda image: image["category"]):
            if launched:
                # Its detector is held no longer: the next one may need its memory.
                finishes.append(launched.pop()())
            part = slice(start, start + len(chosen := list(group)))
            views, levels = tuple(view[part] for view in inputs), [level[part] for level in features]
            launched.append(self._launch(category, chosen, views, levels))
            start = part.stop
        # What a batch that is decided still holds is the host's.
        del inputs, features, views, levels
        yield []
        finishes.append(launched.pop()())
        yield []
        results = chain.from_iterable(finish() for finish in finishes)
        yield [each if isinstance(each, ImageError) else self._columns(each) for each in results]

    def _launch(
        self, category: str, images: Sequence[Row], inputs: Inputs, features: Sequence[torch.Tensor]
    ) -> Callable[[], Finish]:
        """Launch images of one category, see `Detector.score_inputs`."""
        try:
            detector = self._detectors.detector(category)
        except ImageError as error:
            failed = [error] * len(images)
            return lambda: lambda: failed
        sizes = [(image["width"], image["height"]) for image in images]
        inspected = [image["inspected"] for image in images]
        return detector.score_inputs(inputs, sizes, self._request, features, inspected)

    def _columns(self, result: Result) -> dict[str, Any]:
        drawn = self._output.masks and result.region_count
        return {name: getattr(result, name) for name in _COPIED} | {
            "peak_x": result.peak[0],
            "peak_y": result.peak[1],
            "heatmap_levels": _bytes(result.heatmap_levels),
            "region_bits": np.packbits(result.model_map > np.float32(result.pixel_threshold)).data if drawn else None,
            "anomaly_map": _bytes(result.model_map) if self._output.raw_maps else None,
        }

    def _scored_table(self, batch: pa.Table, outcomes: Sequence[Outcome]) -> pa.Table:
        columns = {name: batch[name] for name in DECODED.names} | error_columns(outcomes)
        for name in (name for name in SCORED.names if name not in columns):
            empty = _OF_ERROR.get(name)
            columns[name] = [empty if isinstance(each, ImageError) else each[name] for each in outcomes]
        if not self._output.overlay:
            columns["pixels"] = [b""] * len(outcomes)
        columns["inspected"] = [b""] * len(outcomes)
        return with_passthrough(table(columns, SCORED), batch)


def _bytes(values: npt.NDArray[Any]) -> memoryview:
    return values.ravel().view(np.uint8).data


def overlap(batches: Iterable[Steps]) -> Steps:
    """Take the steps of batches in turn: the first of each before the last of the batch before it.

    While a GPU computes what the first step of a batch launches, the host goes on with the other one.
    """
    last: Steps = iter(())
    for steps in batches:
        yield next(last, [])
        begun = next(steps, [])
        yield from last
        yield begun
        last = steps
    yield from last


def _end_with_broken_gpu() -> None:
    """End this process if the GPU answers no more, as after an illegal access: Ray starts another one.

    This process would make every further image an error.
    """
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        log.exception("the GPU is lost to this process, which ends")
        os._exit(1)
