"""The detector: what a person holds, a worker fits, and a scorer scores with. It knows nothing of Ray."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, repeat
from typing import TYPE_CHECKING, NoReturn, cast, overload

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from stpm.data import pictures
from stpm.data.decoding import Decoded, decode
from stpm.data.mvtec import read_tests
from stpm.data.pictures import Picture
from stpm.data.rois import read_roi
from stpm.errors import ConfigError, ImageError, ModelError, one_line
from stpm.lease import hold_lease
from stpm.method.anomaly_maps import AnomalyMaps, cut_out, select_maps
from stpm.method.arithmetic import choose_arithmetic, warn_of_other_arithmetic
from stpm.method.backbones import StateDict, load_backbone
from stpm.method.calibration import Calibration
from stpm.method.device import device_capabilities, fetch, is_out_of_memory, local_device
from stpm.method.fusion import Distances, fuse_levels, fuse_views, map_weights, on_one_grid, soft_maximum, upsample
from stpm.method.loss import distance_map
from stpm.method.memory_bank import MemoryBank
from stpm.method.peak_features import peak_features
from stpm.method.preprocessing import Content, Preprocessing
from stpm.method.recipe import Recipe
from stpm.method.regions import find_regions
from stpm.method.roi import Roi
from stpm.method.scales import DistanceScale, Floats
from stpm.method.teacher import FeatureExtractor, Inputs, Teacher, spatial_shape
from stpm.models.record import ModelRecord
from stpm.models.store import Model, ModelStore
from stpm.options import WantedBackend
from stpm.result import Request, Result
from stpm.shared_teachers import TeacherSpec, load_teacher

if TYPE_CHECKING:
    from stpm.metrics.category_metrics import CategoryMetrics

log = logging.getLogger(__name__)


def _refuse(*_: object) -> NoReturn:
    raise ModelError("only detectors of stpm.fit and stpm.load have a history and can be saved")


@dataclass(frozen=True, eq=False, repr=False)
class Detector:
    """A model on a device: images in, one result per image out.

    `stpm.fit` and `stpm.load` make detectors. Detectors whose teacher, preprocessing and precision are equal share one
    teacher.

    Args:
        teacher: the frozen teacher, with the preprocessing.
        student: the student in eval mode; None if the recipe has none.
        memory: the memory banks; empty if the recipe has none.
        roi: the part of the images that is inspected; None: all of what the teacher sees.
        distance_scales: scale of each distance map, in the order of `Distances.maps`, and then of each of two views'
            maps; only fusion by quantiles has any.
        calibration: scores of good images; None: not calibrated yet, so that it gives distances and maps alone.
        model_record: what is known of the model besides its weights; None: not calibrated yet.
        publish: writes the model to a store, under a category's name, and returns its record.
        read_history: reads what `history` returns.
    """

    teacher: Teacher
    recipe: Recipe
    student: FeatureExtractor | None
    memory: tuple[MemoryBank, ...]
    roi: Roi | None = None
    distance_scales: tuple[DistanceScale, ...] = ()
    calibration: Calibration | None = None
    model_record: ModelRecord | None = None
    publish: Callable[[ModelStore, str], ModelRecord] = _refuse
    read_history: Callable[[], pa.Table] = _refuse

    @classmethod
    def assemble(
        cls,
        teacher: Teacher,
        recipe: Recipe,
        student: StateDict | None,
        memory: Sequence[MemoryBank],
        origin: str = "the fitted student",
    ) -> Detector:
        """Bring student and memory to the teacher's device and backend. The detector is not calibrated.

        Raises:
            ModelError: if the student's weights do not match the teacher's architecture; it names their `origin`.
        """
        compiled = None
        if student is not None:
            compiled = teacher.compile(load_backbone(recipe.teacher, recipe.levels, student, origin))
        return cls(teacher, recipe, compiled, tuple(bank.to(teacher.device) for bank in memory))

    @classmethod
    def from_model(cls, model: Model, teacher: Teacher) -> Detector:
        """Bring a stored model to the device of its teacher."""
        record = model.record
        return dataclasses.replace(
            cls.assemble(teacher, record.recipe, model.student, model.memory, f"the student of {record.model_id}"),
            roi=record.preprocessing.roi,
            distance_scales=record.distance_scales,
            calibration=model.calibration,
            model_record=record,
        )

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """Return how an image becomes an input, and which part of it is inspected."""
        return dataclasses.replace(self.teacher.preprocessing, roi=self.roi)

    @property
    def record(self) -> ModelRecord:
        """Return what is known of the model besides its weights.

        Raises:
            ModelError: if the detector is not calibrated.
        """
        if not self.model_record:
            raise ModelError("this detector is not calibrated; use one of stpm.fit or stpm.load")
        return self.model_record

    @property
    def history(self) -> pa.Table:
        """Return the student's losses: a row per epoch, in columns of `stpm.fitting.task.Epoch`; empty without one.

        Raises:
            ModelError: if a loaded detector's store no longer has them.
        """
        return self.read_history()

    def __repr__(self) -> str:
        """Name the model, and what it sees."""
        # Before it is saved, a model has no category, with which its id begins.
        name = self.model_record.model_id.removeprefix("-") if self.model_record else "not calibrated"
        teacher = self.teacher
        seen = f"{self.recipe.teacher} at {teacher.preprocessing.size_text}, {teacher.precision}, {teacher.backend}"
        decided = f", threshold {self.record.decision}" if self.model_record and self.record.decision else ""
        return f"Detector({name}, {seen}, {teacher.device}{decided})"

    @property
    def nbytes(self) -> int:
        """Count the bytes of student and memory."""
        memory = sum(tensor.nbytes for bank in self.memory for tensor in bank.tensors.values())
        return memory + (self.student.nbytes if self.student else 0)

    @overload
    def score(self, images: Picture, *, false_alarm_rate: float = ..., region_rate: float = ...) -> Result: ...  # type: ignore[overload-overlap]
    @overload
    def score(
        self,
        images: Iterable[Picture],
        *,
        false_alarm_rate: float = ...,
        region_rate: float = ...,
        rois: Iterable[str] = ...,
    ) -> Iterator[Result]: ...
    def score(
        self,
        images: Picture | Iterable[Picture],
        *,
        false_alarm_rate: float = 0.01,
        region_rate: float = 0.1,
        rois: Iterable[str] = (),
    ) -> Result | Iterator[Result]:
        """Score one image, or many one after the other, of which a few are in memory at a time.

        Args:
            images: a path, a URI, the bytes of a file, a PIL image or an array, see `stpm.data.pictures.Picture`; or
                many of them.
            false_alarm_rate: fraction of good images to call anomalous at most, in (0, 1). n calibration images support
                no rate below 1/(n+1). Where a person decided the threshold, the rate does not change it.
            region_rate: fraction of good images to find any region in at most, likewise; it decides no alarm.
            rois: of many images, the URI of the mask of each one's own region of interest, "" for none.

        Returns:
            The image's result; of many, an iterator over their results, in which an image that cannot be scored is a
            result with an `error`.

        Raises:
            ImageError: if one image cannot be read or decoded.
            ConfigError: if a rate is not in (0, 1).
            ModelError: if the device's memory does not suffice.
        """
        if not (0 < false_alarm_rate < 1 and 0 < region_rate < 1):
            raise ConfigError(
                f"false_alarm_rate is {false_alarm_rate}, region_rate {region_rate}; give numbers between 0 and 1"
            )
        request = Request(false_alarm_rate, region_rate)
        if pictures.is_one(images):
            (result,) = self._score_each([images], request)
            if result.error:
                raise result.error
            return result
        return self._score_each(cast("Iterable[Picture]", images), request, rois)

    def _score_each(self, images: Iterable[Picture], request: Request, rois: Iterable[str] = ()) -> Iterator[Result]:
        remaining, own = iter(images), chain(rois, repeat(""))
        while batch := list(islice(remaining, self.teacher.preprocessing.batch_size)):
            outcomes = [self._decode(image, next(own)) for image in batch]
            decoded = [outcome for outcome in outcomes if isinstance(outcome, Decoded)]
            scored: Iterator[Result] = iter(())
            if decoded:
                sizes = [(each.width, each.height) for each in decoded]
                with _no_memory_as_model_error(), torch.inference_mode():
                    inputs = self.teacher.inputs(torch.from_numpy(np.stack([each.pixels for each in decoded])))
                    inspected = [each.inspected for each in decoded]
                    scored = iter(self.score_inputs(inputs, sizes, request, inspected=inspected)()())
            for image, outcome in zip(batch, outcomes, strict=True):
                if isinstance(outcome, ImageError):
                    yield Result(picture=image, error=outcome)
                else:
                    yield dataclasses.replace(next(scored), picture=image, statistics=outcome.statistics)

    def _decode(self, image: Picture, roi: str) -> Decoded | ImageError:
        try:
            return decode(pictures.fetch(image), self.preprocessing, read_roi(roi) if roi else None)
        except ImageError as error:
            name = pictures.name_of(image)
            return ImageError(error.kind, f"{name}: {error}" if name else str(error))

    def score_inputs(
        self,
        inputs: Inputs,
        sizes: Sequence[tuple[int, int]],
        request: Request,
        features: Sequence[Tensor] = (),
        inspected: Sequence[bytes] = (),
    ) -> Callable[[], Callable[[], list[Result]]]:
        """Launch a batch of images of these sizes (width, height), as `distances` has them: `score_inputs(...)()()`.

        What a device computes is copied twice: the numbers that decide, then what images have to show. The function
        that is returned waits for the first, launches the second, and returns one that waits for it and makes the
        results. This last one holds neither the detector nor a GPU's memory: the next batch may have both.
        `inspected` is as in `stpm.method.preprocessing.Content`.
        """
        if not self.calibration:
            raise ModelError("this detector is not calibrated; use one of stpm.fit or stpm.load")
        calibration, record, preprocessing = self.calibration, self.record, self.preprocessing
        content = preprocessing.content(sizes, inspected)
        features = features or self.teacher(inputs)
        maps = self.anomaly_maps(self.distances(inputs, content, features), content)
        fetched = fetch([part.scalars(self.recipe.top_fraction) for part in maps])

        def decide() -> Callable[[], list[Result]]:
            scalars = np.concatenate(fetched())
            max_pixels, totals = scalars[:, [0, 2]].astype(np.float32).T
            peaks = [divmod(int(at), preprocessing.width)[::-1] for at in scalars[:, 1]]
            boxes, shape = content.boxes.tolist(), preprocessing.input_shape
            p_values = calibration.p_values(totals)
            threshold = np.float32(record.threshold(calibration.scores, request.false_alarm_rate))
            pixel_threshold = calibration.pixel_threshold(request.region_rate)
            is_anomalous, has_regions = totals > threshold, max_pixels > np.float32(pixel_threshold)
            is_kept, every = has_regions | request.maps, np.ones_like(is_anomalous)
            is_drawn = {"all": every, "anomalous": is_anomalous, "none": ~every}[request.heatmaps]
            drawn = [calibration.scale.levels(each) for each in select_maps(maps, is_drawn)]
            described = [
                peak_features(self.memory, [level[i] for level in features], peaks[i], boxes[i], shape)
                for i in np.flatnonzero(is_anomalous).tolist()
            ]
            vectors = [each[None] for each in described if each is not None]
            shown = fetch([*select_maps(maps, is_kept), *drawn, *vectors])

            def finish() -> list[Result]:
                copies, flags = chain.from_iterable(shown()), (is_kept, is_drawn, is_anomalous)
                model_maps, levels, looks = (iter([*islice(copies, int(each.sum()))]) for each in flags)
                results = []
                for i, (width, height) in enumerate(sizes):
                    left, top, *_ = boxes[i]
                    of_views: list[float] = scalars[i, 3:].tolist()
                    fine, coarse, *_ = (*of_views, None, None)
                    model_map = cut_out(next(model_maps), boxes[i]) if is_kept[i] else np.zeros((0, 0), np.float32)
                    grey = cut_out(next(levels), boxes[i]) if is_drawn[i] else np.zeros((0, 0), np.uint8)
                    looks_like = next(looks, None) if is_anomalous[i] else None
                    found = (model_map, pixel_threshold, preprocessing, width, height)
                    regions, region_count, area = find_regions(*found) if has_regions[i] else ((), 0, 0.0)
                    results.append(
                        Result(
                            score=float(totals[i]),
                            fine_score=fine,
                            coarse_score=coarse,
                            p_value=float(p_values[i]),
                            is_anomalous=bool(is_anomalous[i]),
                            threshold=float(threshold),
                            peak=preprocessing.to_original(peaks[i][0] - left, peaks[i][1] - top, width, height),
                            peak_features=looks_like if looks_like is not None and looks_like.any() else None,
                            pixel_threshold=pixel_threshold,
                            area=area,
                            region_count=region_count,
                            regions=regions,
                            size=(width, height),
                            seen=preprocessing.seen_box(width, height),
                            model_map=model_map,
                            heatmap_levels=grey,
                            heatmap_scale=calibration.scale,
                            seed=record.recipe.seed,
                            model_id=record.model_id,
                        )
                    )
                return results

            return finish

        return decide

    @torch.no_grad()
    def distances(self, inputs: Inputs, content: Content, features: Sequence[Tensor] = ()) -> Distances:
        """Measure how far the teacher's features are from the student's, and from each memory bank.

        Args:
            inputs: of B images, from `Teacher.inputs`.
            content: of the same images.
            features: the teacher's, of all levels, (B, Cₗ, Hₗ, Wₗ) each; empty: compute them.
        """
        features = features or self.teacher(inputs)
        student: tuple[Tensor, ...] = ()
        if self.student:
            matched = self.teacher.compute(self.student, inputs[-1])
            targets = [features[i] for i in self.teacher.student_indices(self.recipe.levels)]
            student = tuple(distance_map(t, s) for t, s in zip(targets, matched, strict=True))
        valid = self.teacher.content_masks(content, [spatial_shape(level) for level in features])
        memory = (
            bank.distance_map(features[bank.spec.level_index], valid[bank.spec.level_index]) for bank in self.memory
        )
        return Distances(student, tuple(memory))

    def anomaly_maps(
        self, distances: Distances, content: Content, scales: Sequence[DistanceScale] | None = None
    ) -> list[AnomalyMaps]:
        """Fuse B images' distances, with the model's distance scales or others.

        Args:
            distances: from `distances`.
            content: of the same images.
            scales: as `distance_scales`; None: the model's.

        Returns:
            On a CPU, whose cache holds one image, those of each; else those of all together.
        """
        scales = self.distance_scales if scales is None else scales
        shape = self.teacher.preprocessing.input_shape
        if self.recipe.fusion == "quantile":
            views = fuse_views(self.on_one_grid(distances, content), self.map_weights, scales)
            (valid,) = self.teacher.content_masks(content, [spatial_shape(views)])
        else:
            masks = self.teacher.content_masks(content, [spatial_shape(each) for each in distances.student])
        count = len(content)
        maps = []
        for part in [slice(i, i + 1) for i in range(count)] if self.teacher.device.type == "cpu" else [slice(count)]:
            if self.recipe.fusion == "quantile":
                of_views = views[:, part]
                fused = soft_maximum(of_views, self.recipe.coarse_weight)
                total = upsample(fused, shape, None if valid is None else valid[part])
            else:
                levels = [each[part] for each in distances.student]
                of_views = levels[0].new_zeros(0, len(levels[0]), 1, 1)
                inside = [None if mask is None else mask[part] for mask in masks]
                total = fuse_levels(levels, inside, self.recipe.fusion, shape)
            maps.append(AnomalyMaps.smooth(total, of_views, content[part], self.recipe.smoothing))
        return maps

    def on_one_grid(self, distances: Distances, content: Content) -> Tensor:
        """Bring K distance maps of B images with this content to the finest one's shape: (K, B, h, w)."""
        valid = self.teacher.content_masks(content, [spatial_shape(each) for each in distances.maps])
        return on_one_grid(distances.maps, valid)

    @cached_property
    def map_weights(self) -> Floats:
        """Return the weight of each distance map in each view, (V, K) float32; see `stpm.method.fusion.map_weights`."""
        last = len(self.teacher.views) - 1
        student = [last] * len(self.recipe.levels) if self.student else []
        of_level = [index for index, view in enumerate(self.teacher.views) for _ in view.levels]
        memory = [of_level[bank.spec.level_index] for bank in self.memory]
        return map_weights(student, memory, self.recipe.student_weight)

    def evaluate(self, folder: str | os.PathLike[str], *, false_alarm_rate: float = 0.01) -> CategoryMetrics:
        """Score labelled images, and return metrics as the benchmark's report has them, shown as a table.

        `folder` is the path or URI of a category's folder `test` in the MVTec AD layout; masks are read beside it, and
        compared at model size.

        Raises:
            DataError: if there are no test images.
        """
        # They import scikit-learn, which takes scorers and workers a second.
        from stpm.metrics.category_metrics import ScoredImage, label_scores, measure_category

        tests = read_tests(os.fspath(folder))
        rois = [test.roi for test in tests]
        results = self.score((test.uri for test in tests), false_alarm_rate=false_alarm_rate, rois=rois)
        images = (
            (
                ScoredImage(
                    *(test.uri, test.label, test.mask, *result.size),
                    *(result.score, result.is_anomalous, result.threshold, str(result.error or "")),
                ),
                result.model_map,
            )
            for test, result in zip(tests, results, strict=True)
        )
        preprocessing = self.preprocessing
        return measure_category(label_scores(images, preprocessing, batch_size=preprocessing.batch_size))

    def save(self, store: str | os.PathLike[str], category: str) -> ModelRecord:
        """Publish the model as a new version of a category, as the fit job does, and make it the current one.

        The store, a path or URI, is made where it is missing. Return the model's record, as it is stored.

        Raises:
            ConfigError: if another process holds the store, such as a fit.
            DataError: if the category's name is not allowed in a path.
            ModelError: if the model cannot be read from where it was loaded.
        """
        models = ModelStore(os.fspath(store))
        with hold_lease(models.uri, wait=False):
            return self.publish(models, category)


def load(
    store: str | os.PathLike[str], category: str = "", version: str = "", *, backend: WantedBackend = "auto"
) -> Detector:
    """Load a model from a store.

    Args:
        store: a path or URI.
        category: "": the only one in the store.
        version: id of one of the category's models; "": the current one.
        backend: what computes features on a CPU: `pytorch`, or `openvino`, which is faster there; `auto`: OpenVINO
            where it is installed.

    Raises:
        DataError: if there is no such store, or the category's name is not allowed in a path.
        ModelError: if there is no such model, or it cannot be loaded.
        DeviceError: if torch cannot use this machine's GPU.
    """
    models = ModelStore(os.fspath(store))
    if not category:
        names = models.categories()
        if len(names) != 1:
            raise ModelError(f"{models.uri} has models of {len(names)} categories; name one")
        (category,) = names
    model = models.load(category, version)
    device = local_device()
    arithmetic = choose_arithmetic([device_capabilities(device)], backend)
    if warning := warn_of_other_arithmetic(arithmetic, [(model.record.fit.backend, model.record.precision)]):
        log.warning(warning)
    with _no_memory_as_model_error():
        detector = Detector.from_model(
            model, load_teacher(models, TeacherSpec.of_model(model.record, device, arithmetic))
        )
    return dataclasses.replace(
        detector,
        publish=lambda target, name: target.copy_model(models, model.record, name),
        read_history=lambda: models.history(model.record),
    )


@contextmanager
def _no_memory_as_model_error() -> Iterator[None]:
    """Raise ModelError if the device's memory does not suffice: other categories can go on."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"no memory for the model or its images ({one_line(error)}); try again when other processes have ended, or "
            "on the CPU with CUDA_VISIBLE_DEVICES="
        ) from error
