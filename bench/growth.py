"""Section `growth` of `run.py`: whether time per image and per category stay the same, and memory flat.

A tiny student scores tiny images, so that everything else is measured.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
from commands import CORES, job_command, time_command
from measured import Measured
from PIL import Image

from stpm.models.store import ModelStore
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import open_rows

# A student so small that its own time does not count.
_TINY = {"preset": "paper", "teacher": "test_resnet", "teacher-weights": "random", "batch-size": 4, "epochs": 1}
_TINY_SIDE = 32
_IMAGES_PER_ARCHIVE = 5000
_DISTINCT_IMAGES = 1000
_BROKEN_EVERY = 500


def measure_growth(
    root: Path, image_counts: Sequence[int], category_counts: Sequence[int], node_count: int
) -> Iterator[Measured]:
    """Score growing numbers of tiny images, and fit growing numbers of tiny categories.

    Args:
        root: empty folder.
        image_counts: numbers of images to score.
        category_counts: numbers of categories to fit.
        node_count: nodes of a local cluster; 0: the cluster that RAY_ADDRESS names, or this machine.
    """
    with nodes(node_count):
        models, _, _ = fit_tiny(root / "one-category", 1)
        # In a short run, much is decoded while the scorers start: only the time of further images is the same.
        fewer, fewer_seconds, first = 0, 0.0, 0.0
        for count in sorted(image_counts):
            write_archives(root / f"images-{count}", count)
            out = root / f"out-{count}"
            options = {"models": models, "images": root / f"images-{count}", "out": out, "mounted": root}
            cost = time_command(job_command("score", options | {"category": "nut0", "top": 0}))
            rows = open_rows(RunOutput.single(str(out))).to_table(columns=["uri", "error_kind"]).to_pydict()
            details = {
                "twice": len(rows["uri"]) - len({*rows["uri"]}),
                "missing": count - len({*rows["uri"]}),
                "errors": sum(map(bool, rows["error_kind"])),
                "images_per_second_by_quarter": speed_by_quarter(out / "scores", count),
            }
            job = 1000 * (cost["seconds"] - fewer_seconds) / (count - fewer)
            yield Measured(f"{fewer} to {count} images", "ms/image", job, first or job, details=cost | details)
            first = first or (job if fewer else 0.0)
            fewer, fewer_seconds = count, cost["seconds"]
        for count in category_counts:
            _, seconds, own = fit_tiny(root / f"categories-{count}", count)
            yield Measured(f"{count} categories", "ms/category", seconds * 1000 / count, own * 1000 / count)


def speed_by_quarter(folder: Path, images: int) -> list[int]:
    """Return the images per second in each quarter of a run, from the times at which its Parquet files were written.

    The first quarter begins with the first file.
    """
    times = sorted(path.stat().st_mtime for path in folder.rglob("*.parquet"))
    ends = [times[round((len(times) - 1) * quarter / 4)] for quarter in range(5)]
    return [round(images / 4 / (end - start)) for start, end in pairwise(ends) if end > start]


def fit_tiny(root: Path, count: int) -> tuple[Path, float, float]:
    """Write tiny categories, and fit them with a worker per core.

    Returns:
        The model store; the job's seconds; and those of the fits themselves: their sum, divided by the workers.
    """
    models, workers = root / "models", min(CORES, count)
    write_categories(root / "data", count)
    given = {"data": root / "data", "models": models, "mounted": root, "size": _TINY_SIDE, **_TINY}
    seconds = time_command(job_command("fit", given | {"workers": workers, "cpus-per-worker": 1}))["seconds"]
    store = ModelStore(str(models))
    return models, seconds, sum(store.record(f"nut{number}").fit.seconds for number in range(count)) / workers


def write_categories(root: Path, count: int) -> None:
    for number in range(count):
        folder = root / f"nut{number}" / "train" / "good"
        folder.mkdir(parents=True, exist_ok=True)
        for image in range(10):
            (folder / f"{image}.png").write_bytes(make_image(image))


def write_archives(folder: Path, count: int) -> None:
    """Write images of several formats to tar archives, one in 500 of them broken."""
    folder.mkdir()
    formats = ("PNG", "JPEG", "TIFF")
    images = [make_image(i, formats[i % len(formats)]) for i in range(_DISTINCT_IMAGES)]
    for start in range(0, count, _IMAGES_PER_ARCHIVE):
        with tarfile.open(folder / f"{start:07}.tar", "w") as archive:
            for number in range(start, min(start + _IMAGES_PER_ARCHIVE, count)):
                data = images[number % _DISTINCT_IMAGES][: None if number % _BROKEN_EVERY else 40]
                member = tarfile.TarInfo(f"{number:07}.{formats[number % _DISTINCT_IMAGES % len(formats)].lower()}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def make_image(seed: int, file_format: str = "PNG") -> bytes:
    """Return a tiny image file of grey noise."""
    pixels = np.random.default_rng(seed).integers(90, 130, (_TINY_SIDE, _TINY_SIDE, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, file_format)
    return sink.getvalue()


@contextmanager
def nodes(count: int) -> Iterator[None]:
    """Start a head that takes no work and nodes of one CPU, all of them processes on this machine; 0: start none."""
    if not count:
        yield
        return
    from ray.cluster_utils import Cluster

    # As cluster.yaml starts nodes: by default Ray ends processes that are idle for a second, and starts them again.
    with patch.dict(os.environ, RAY_AUTH_MODE="disabled", RAY_idle_worker_killing_time_threshold_ms="60000"):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        os.environ["RAY_ADDRESS"] = cluster.address
        try:
            for number in range(count):
                cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{number + 2}", object_store_memory=2**29)
            yield
        finally:
            cluster.shutdown()
