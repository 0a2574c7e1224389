"""Measure what a scorer does on the host for each image beside the networks: time, waits, and bytes that are copied.

    python bench/host_work.py
    python bench/host_work.py --heatmaps none

Puts constant features and distances in the place of the normalisation, the networks and the memory search, so that what
is left is what a GPU would wait for, and what follows it: batches from Arrow, fusion, scores, regions, grey levels, and
rows to Arrow. Prints CPU microseconds per image of one thread, the median of --repeats batches; how often a batch waits
for a device; and the bytes per image that come from it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from commands import make_parser
from PIL import Image
from tabulate import tabulate
from torch import Tensor

import stpm
from stpm import detector as detectors
from stpm.data.image_files import ImageRef
from stpm.detector import Detector
from stpm.method.arithmetic import Arithmetic
from stpm.method.fusion import Distances
from stpm.method.recipe import Recipe
from stpm.method.teacher import Teacher, spatial_shape
from stpm.models.store import ModelStore
from stpm.options import Size
from stpm.scoring.inputs.manifest import ManifestRow, make_rows
from stpm.scoring.options import OutputOptions, ScoreOptions
from stpm.scoring.stages.decode import Decode
from stpm.scoring.stages.scorer import Scorer

_SIDES = (320, 512)
_CATEGORY = "part"
_BATCH = 16


def make_store(folder: Path) -> ModelStore:
    """Fit a small model of one view, with a memory alone."""
    good = np.random.default_rng(0).integers(90, 130, (12, *_SIDES, 3), dtype=np.uint8)
    size = Size(f"{_SIDES[0]}x{_SIDES[1]}")
    recipe = Recipe("demo", student="none", memory=100, size=size, fusion="quantile", top_fraction=0.005)
    stpm.fit(good, recipe, progress=False).save(folder, _CATEGORY)
    return ModelStore(str(folder))


class Stubs:
    """Features and distances of batches in which the first images have a defect, and counts of what is copied."""

    def __init__(self, detector: Detector, anomalous: float) -> None:
        levels = detector.teacher(detector.teacher.inputs(torch.zeros(1, *_SIDES, 3, dtype=torch.uint8)))
        self._features = [level.expand(_BATCH, -1, -1, -1) for level in levels]
        self._distances = []
        for bank in detector.memory:
            distances = torch.rand(_BATCH, *spatial_shape(levels[bank.spec.level_index])) * 0.01
            distances[: round(anomalous * _BATCH), 3:9, 4:12] = 100.0
            self._distances.append(distances)
        self.waits = self.bytes = 0
        self._fetch, self._cpu = getattr(detectors, "fetch", None), Tensor.cpu

    def features(self, *_: object) -> list[Tensor]:
        return self._features

    def distances(self, *_: object) -> Distances:
        return Distances((), tuple(self._distances))

    def fetch(self, tensors: Sequence[Tensor]) -> Any:
        """Count as the function that `stpm.method.device.fetch` returns waits: once."""
        self.waits += 1
        self.bytes += sum(each.nbytes for each in tensors)
        return self._fetch(tensors) if self._fetch else []

    @property
    def cpu(self) -> Callable[[Tensor], Tensor]:
        def copy(tensor: Tensor) -> Tensor:
            self.waits += 1
            self.bytes += tensor.nbytes
            return self._cpu(tensor)

        return copy


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Score batches of one image, after one that loads everything."""
    Image.fromarray(np.full((*_SIDES, 3), 110, np.uint8)).save(folder / "image.png")
    store = make_store(folder / "models")
    record = store.record(_CATEGORY)
    images = [ManifestRow(ImageRef(str(folder / "image.png")), _CATEGORY)] * _BATCH
    batch = Decode({_CATEGORY: record.preprocessing})(make_rows(images))
    options = ScoreOptions(scoring_batch_size=_BATCH)
    output = OutputOptions(heatmaps=arguments.heatmaps)
    scorer = Scorer(store, {_CATEGORY: record}, options, output, Arithmetic("pytorch", "bfloat16"))
    stubs = Stubs(stpm.load(store.uri, _CATEGORY, backend="pytorch"), arguments.anomalous)
    seconds = []
    with (
        patch.object(Teacher, "inputs", lambda *_: ()),
        patch.object(Teacher, "__call__", stubs.features),
        patch.object(Detector, "distances", stubs.distances),
        patch.object(detectors, "fetch", stubs.fetch, create=True),
        patch.object(Tensor, "cpu", stubs.cpu),
    ):
        scorer(batch)
        stubs.waits = stubs.bytes = 0
        for _ in range(arguments.repeats):
            start = time.process_time()
            scorer(batch)
            seconds.append(time.process_time() - start)
    return {
        "us per image": round(statistics.median(seconds) / _BATCH * 1e6),
        "waits per batch": stubs.waits / arguments.repeats,
        "KiB per image": round(stubs.bytes / arguments.repeats / _BATCH / 1024, 1),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--anomalous", type=float, default=0.125, help="fraction of images with a defect")
    parser.add_argument("--heatmaps", default="all", choices=("all", "anomalous", "none"))
    parser.add_argument("--repeats", type=int, default=15, help="batches")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(tabulate([measure(Path(folder), arguments)], "keys", "pipe"))


if __name__ == "__main__":
    main()
