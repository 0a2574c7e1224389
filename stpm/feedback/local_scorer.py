"""Score images with a model in this process, as scoring does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from stpm.cluster.device import assigned_device
from stpm.data import images
from stpm.errors import ImageError, ModelError, one_line
from stpm.method.arithmetic import choose_arithmetic
from stpm.method.device import device_capabilities, is_out_of_memory
from stpm.method.forward import Matcher
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.options import WantedBackend

# Images per forward pass. Scores do not depend on it.
BATCH_SIZE = 16


class LocalScore(NamedTuple):
    """An image's score, the largest value of its anomaly map, and its statistics in the order of COMPARED."""

    score: float
    peak: float
    statistics: tuple[float, ...]


class LocalScorer:
    """A category's model, loaded to score image files.

    Args:
        store: the store that has the model.
        category: name of the model's category.
        model_id: id of one of the category's models; "": the current one.
        backend: what computes features on a CPU.

    Raises:
        DataError: if the category's name is not allowed in a path.
        ModelError: if the model cannot be loaded, or its memory or that of a call does not suffice.
        DeviceError: if torch cannot use the GPU.
    """

    def __init__(self, store: ModelStore, category: str, model_id: str, backend: WantedBackend) -> None:
        device = assigned_device()
        arithmetic = choose_arithmetic([device_capabilities(device)], backend)
        with _no_memory_as_model_error(category):
            model = store.load(category, model_id).to(device)
            record = model.record
            teacher = store.load_teacher(record.recipe.teacher, record.recipe.levels, record.teacher_digest)
            precision = arithmetic.precision_to_score(record.precision)
            self._matcher = Matcher(teacher, record.preprocessing, device, precision, arithmetic.backend)
            self._model = dataclasses.replace(model, parts=self._matcher.compile(model.parts))

    @property
    def record(self) -> ModelRecord:
        """The model's record."""
        return self._model.record

    def __call__(self, files: Iterable[bytes]) -> Iterator[LocalScore | ImageError]:
        """Score image files; yield the error of an image that cannot be decoded."""
        files = iter(files)
        while batch := list(islice(files, BATCH_SIZE)):
            outcomes = [_decode(data, self.record) for data in batch]
            with _no_memory_as_model_error(self.record.category):
                scores = iter(self._score([outcome for outcome in outcomes if isinstance(outcome, images.Decoded)]))
            yield from (outcome if isinstance(outcome, ImageError) else next(scores) for outcome in outcomes)

    @torch.inference_mode()
    def _score(self, decoded: Sequence[images.Decoded]) -> list[LocalScore]:
        if not decoded:
            return []
        record, matcher = self.record, self._matcher
        inputs = matcher.inputs(torch.from_numpy(np.stack([image.pixels for image in decoded])))
        content = record.preprocessing.content_boxes((image.width, image.height) for image in decoded)
        distances = matcher.distances(self._model.parts, inputs, content)
        maps = matcher.anomaly_maps(distances, content, record.recipe, record.distance_scales)
        return [
            LocalScore(
                anomaly_map.score(record.recipe.top_fraction).total,
                float(anomaly_map.total.max()),
                (image.width, image.height, *image.statistics),
            )
            for image, anomaly_map in zip(decoded, maps, strict=True)
        ]


@contextmanager
def _no_memory_as_model_error(category: str) -> Iterator[None]:
    """Raise ModelError if the device's memory does not suffice: other categories can go on."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"no memory to score images of {category} ({one_line(error)}); try again when other jobs have ended, or on "
            "the CPU with CUDA_VISIBLE_DEVICES="
        ) from error


def _decode(data: bytes, record: ModelRecord) -> images.Decoded | ImageError:
    try:
        return images.decode(data, record.preprocessing)
    except ImageError as error:
        return error
