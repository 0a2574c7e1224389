"""The dry run: score an even sample of the images, and estimate what the whole run takes."""

from __future__ import annotations

import dataclasses
import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from stpm import storage
from stpm.scoring.inputs.manifest import Manifest, write_manifest
from stpm.scoring.run import run_scoring
from stpm.scoring.run_statistics import RunResult
from stpm.scoring.scoring_run import ScoringRun
from stpm.times import duration

log = logging.getLogger(__name__)

SAMPLE_SIZE = 200


def dry_run(run: ScoringRun) -> None:
    """List all images, score a sample of them, and log an estimate for the whole.

    The run's output is not touched, except for a folder in it that is removed again.

    Raises:
        ConfigError: as `run_scoring` does.
        DataError: if the sources cannot be read.
        ModelError: if no image of the sample has a model.
    """
    # A dry run takes no lease, so each has a folder of its own.
    folder = storage.join(run.output.folder, f"dry-run-{uuid.uuid4().hex[:8]}")
    manifest_folder = storage.join(folder, "all-images")
    try:
        start = time.perf_counter()
        manifest = write_manifest(run.rows(), manifest_folder)
        log.info(f"{manifest.describe()}, listed in {duration(time.perf_counter() - start)}; now scoring a sample")
        sample = dataclasses.replace(
            run,
            rows=partial(sample_evenly, manifest, manifest_folder, SAMPLE_SIZE),
            options=dataclasses.replace(run.options, accept_errors=True),
            output=dataclasses.replace(run.output, folder=folder, state_folder=folder),
            triage_images=0,
        )
        result, _ = run_scoring(sample, start_over=True)
        written = storage.file_sizes(sample.output.scores) + storage.file_sizes(sample.output.heatmaps)
        log.info(describe_estimate(manifest.rows, result, [size for _, size in written]))
    finally:
        storage.remove(folder)


def describe_estimate(images: int, sample: RunResult, file_sizes: Sequence[int]) -> str:
    """Estimate what a run takes, in one line, from a sample of it. `file_sizes` are of the sample's files, in bytes."""
    speed = sample.steady_images_per_second
    start_seconds = max(sample.seconds - sample.rows / speed, 0.0)
    scale = images / sample.rows
    return (
        f"all {images} images: about {duration(start_seconds + images / speed)} on this cluster ({speed:.0f} images/s "
        f"after {duration(start_seconds)} of starting), {sum(file_sizes) * scale / 2**30:.2f} GiB in about "
        f"{len(file_sizes) * scale:.0f} objects, {sample.anomalous * scale:.0f} anomalous, "
        f"{sample.error_count * scale:.0f} with an error"
    )


def sample_evenly(manifest: Manifest, folder: str, size: int) -> Iterator[pa.Table]:
    """Select rows of the manifest in a folder, spread evenly over it; all if there are fewer than `size`."""
    chosen = np.unique(np.linspace(0, manifest.rows - 1, min(size, manifest.rows)).round().astype(np.int64))
    first = 0
    for segment in manifest.segments(folder):
        for uri, rows, _ in segment.shards:
            inside = chosen[(chosen >= first) & (chosen < first + rows)] - first
            first += rows
            if len(inside):
                yield storage.read_table(uri).take(pa.array(inside))
