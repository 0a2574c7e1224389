"""Measure how far a scorer is from the forward passes alone, on the device of this process: a GPU if there is one.

    python bench/gpu.py
    python bench/gpu.py --teacher resnet18.tv_in1k --side 256 --batch 64,256 --heatmaps anomalous
    python bench/gpu.py --peer PEER/bin/python --data DATA
    python bench/gpu.py --waits

For a student alone, a memory alone, and both: images per second of the networks' forward passes on inputs that are on
the device already, of those with fusion and memory search (distances and maps, nothing copied back), and of the scorer,
from rows of decoded images to rows of results, in one process; each at every batch size, the median of --repeats, in
turn. With --peer, anomalib's `Engine.predict` on the same device (see bench/run.py). The models are fitted on noise,
whose speed is that of any other images.

What only a GPU can show:

- Weights that are cast once keep autocast's bits: `python -m pytest tests/method/test_teacher.py`, on cuda too there.
- A batch waits twice, for what it has to show and for the numbers before it, and for no copy to the device: --waits
  prints each other operation that waits, once per line of code, with its place (torch.cuda.set_sync_debug_mode).
- The host's work is hidden behind the next batch: "scorer/s" is near "with maps/s". With one batch at a time, which
  --sequential measures, the host's time adds to it (`python bench/host_work.py` measures that). In a run, Ray gives a
  scorer 256 images at a time, among which batches overlap: --images 256.
- Whether CUDA graphs are worth their code: "replayed/s" is "networks/s" from a captured graph. Near it at the batch
  size that scorers choose, launches cost nothing; well above it, capture teacher and student per shape and batch size.
- Results of a batch that another one overlaps: `python -m pytest tests/scoring/stages tests/test_detector.py`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from anomalib_peer import Teacher, predict_speeds
from commands import integers, make_parser
from PIL import Image
from tabulate import tabulate

import stpm
from stpm.data import mvtec
from stpm.data.image_files import ImageRef
from stpm.method.arithmetic import Arithmetic, choose_arithmetic
from stpm.method.device import device_capabilities, local_device
from stpm.method.recipe import Recipe
from stpm.models.store import ModelStore
from stpm.options import Size
from stpm.scoring.inputs.manifest import ManifestRow, make_rows
from stpm.scoring.options import OutputOptions, ScoreOptions
from stpm.scoring.stages.decode import Decode
from stpm.scoring.stages.scorer import Scorer

_MODELS = ("student", "memory", "both")


def make_store(folder: Path, teacher: str, side: int) -> ModelStore:
    """Fit one model of each kind, which is as fast as any other."""
    good = np.random.default_rng(0).integers(90, 130, (24, side, side, 3), dtype=np.uint8)
    for name in _MODELS:
        recipe = Recipe(
            teacher,
            size=Size(str(side)),
            epochs=1,
            student="none" if name == "memory" else "stpm",
            memory=0 if name == "student" else 2000,
            fusion="product" if name == "student" else "quantile",
        )
        stpm.fit(good, recipe, progress=False).save(folder / "models", name)
    Image.fromarray(good[0]).save(folder / "image.png")
    return ModelStore(str(folder / "models"))


def median_speed(run: Callable[[], object], images: int, repeats: int) -> float:
    """Return images per second of the median of runs, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return images / statistics.median(seconds[1:])


def capture(run: Callable[[], object]) -> Callable[[], object]:
    """Record what a run launches as a CUDA graph; return what replays it, from the same inputs to the same outputs."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def measure(
    store: ModelStore, name: str, rows: pa.Table, arithmetic: Arithmetic, options: argparse.Namespace, size: int
) -> list[float]:
    """Return the images per second of forward passes, of replayed ones, of maps, and of the scorer, at a batch size."""
    detector = stpm.load(store.uri, name)
    teacher = detector.teacher
    sides = teacher.preprocessing.input_shape
    pixels = torch.randint(0, 256, (size, *sides, 3), dtype=torch.uint8)
    content = teacher.preprocessing.content([sides[::-1]] * size)
    with torch.inference_mode():
        inputs = teacher.inputs(pixels)

        def forward() -> object:
            features = teacher(inputs)
            return features, teacher.compute(detector.student, inputs[-1]) if detector.student else None

        def maps() -> object:
            parts = detector.anomaly_maps(detector.distances(inputs, content), content)
            return [part.scalars(detector.recipe.top_fraction) for part in parts]

        replayed = capture(forward) if teacher.device.type == "cuda" else forward
        speeds = [median_speed(run, size, options.repeats) for run in (forward, replayed, maps)]
    scorer = Scorer(
        store,
        {name: store.record(name)},
        ScoreOptions(scoring_batch_size=size),
        OutputOptions(heatmaps=options.heatmaps),
        arithmetic,
    )
    if options.sequential:
        scorer._run = chain.from_iterable
    scorer(rows)
    if options.waits:
        torch.cuda.set_sync_debug_mode("warn")
        scorer(rows)
        torch.cuda.set_sync_debug_mode("default")
    return [*speeds, median_speed(lambda: scorer(rows), rows.num_rows, options.repeats)]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--side", type=int, default=256, help="pixels of the input's sides")
    parser.add_argument("--batch", type=integers, default=[16, 64, 256])
    parser.add_argument("--images", type=int, default=512, help="that the scorer is given at once")
    parser.add_argument("--heatmaps", default="all", choices=("all", "anomalous", "none"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sequential", action="store_true", help="finish a batch before the next one is launched")
    parser.add_argument("--waits", action="store_true", help="print what waits for the device while a scorer scores")
    parser.add_argument("--peer", default="", help="python of the environment that has anomalib")
    parser.add_argument("--data", default="", help="for --peer: local folder in the MVTec AD layout")
    options = parser.parse_args()
    device = local_device()
    arithmetic = choose_arithmetic([device_capabilities(device)], "auto")
    print(
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, {arithmetic}, torch {torch.__version__}"
    )
    rows = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        store = make_store(folder, options.teacher, options.side)
        for name in _MODELS:
            images = [ManifestRow(ImageRef(str(folder / "image.png")), name)] * options.images
            decoded = Decode({name: store.record(name).preprocessing})(make_rows(images))
            for size in options.batch:
                speeds = measure(store, name, decoded, arithmetic, options, size)
                rows.append([name, size, *map(round, speeds), f"{speeds[-1] / speeds[0]:.2f}"])
        if options.peer:
            category = mvtec.read_category(options.data, mvtec.find_categories(options.data)[0])
            (folder / "peer").mkdir()
            for number in range(options.images):
                uri = category.test[number % len(category.test)].uri
                (folder / "peer" / f"{number:06}{Path(uri).suffix}").symlink_to(uri)
            (folder / "run").mkdir()
            speed, _ = predict_speeds(options.peer, folder / "run", Teacher(options.teacher), folder / "peer")
            rows.append(["anomalib", "", "", "", "", speed, ""])
    titles = ["model", "batch", "networks/s", "replayed/s", "with maps/s", "scorer/s", "scorer / networks"]
    print(tabulate(rows, titles, "pipe"))


if __name__ == "__main__":
    main()
