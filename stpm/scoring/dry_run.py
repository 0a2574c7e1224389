"""What a pass would take: an even sample of it scored for real, and the whole predicted."""

from __future__ import annotations

import dataclasses
import logging
import time
import uuid
from collections.abc import Iterator
from functools import partial

import numpy as np
import pyarrow as pa

from stpm import storage
from stpm.console import duration
from stpm.scoring.inputs import manifest
from stpm.scoring.resuming.run_state import Counts, RunState
from stpm.scoring.run import ScoringRun, run_scoring

log = logging.getLogger(__name__)

SAMPLE = 200
_FOLDER = "dry-run-{}"
_WRITTEN = (".parquet", ".png")


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What the whole would take, from what a sample took: seconds, bytes and objects written, images called anomalous.

    Args:
        rows: of the whole.
        sample: counts of the sample.
        start: seconds before the first image of the sample was done.
        speed: images per second from then on.
        sizes: of the objects that the sample wrote.
    """

    rows: int
    sample: Counts
    start: float
    speed: float
    sizes: list[int]

    @property
    def seconds(self) -> float:
        return self.start + self.rows / self.speed

    @property
    def bytes(self) -> int:
        return round(sum(self.sizes) * self.rows / self.sample.rows)

    @property
    def objects(self) -> int:
        return round(len(self.sizes) * self.rows / self.sample.rows)

    def in_words(self) -> str:
        """One line."""
        anomalous, failed = (self.rows * n / self.sample.rows for n in (self.sample.anomalous, self.sample.failed))
        return (
            f"all {self.rows} images: about {duration(self.seconds)} on this cluster ({self.speed:.0f} images/s after "
            f"{duration(self.start)} of starting), {self.bytes / 2**30:.2f} GiB in about {self.objects} objects, "
            f"{anomalous:.0f} anomalous, {failed:.0f} with an error"
        )


def dry_run(of: ScoringRun) -> None:
    """List everything, score a sample, say what the whole would take.

    Args:
        of: the pass. Its output is not touched, but for a folder in it that is removed.

    Raises:
        ConfigError: as `run_scoring` does.
        DataError: if the sources cannot be read.
        ModelError: if no image of the sample has a model.
    """
    # A folder of its own: it holds no lease, so others may be at work, and at a dry run too.
    home = storage.join(of.output.out, _FOLDER.format(uuid.uuid4().hex[:8]))
    listed = storage.join(home, "listed")
    try:
        began = time.perf_counter()
        whole = manifest.write(of.rows(), listed)
        log.info(f"{whole.describe()}, listed in {duration(time.perf_counter() - began)}; now a sample of them")
        output = dataclasses.replace(of.output, out=home, home=home)
        options = dataclasses.replace(of.options, accept_errors=True)
        rows = partial(evenly, listed, whole.rows, SAMPLE)
        sample = dataclasses.replace(of, rows=rows, options=options, output=output, top=0)
        began = time.perf_counter()
        counts = run_scoring(sample, start_over=True, replace=True)
        seconds = time.perf_counter() - began
        effort = RunState(home).effort()
        speed = effort.steady_images_per_second or effort.images_per_second
        written = storage.files(output.scores) + storage.files(storage.join(home, "heatmaps"))
        sizes = [size for uri, size in written if uri.endswith(_WRITTEN)]
        log.info(Forecast(whole.rows, counts, max(seconds - counts.rows / speed, 0.0), speed, sizes).in_words())
    finally:
        storage.remove(home)


def evenly(folder: str, rows: int, wanted: int) -> Iterator[pa.Table]:
    """So many rows of a manifest, spread evenly over it; all if there are fewer."""
    chosen = np.unique(np.linspace(0, rows - 1, min(wanted, rows)).round().astype(np.int64))
    before = 0
    for uri in manifest.shards(folder):
        shard = storage.read_table(uri)
        inside = chosen[(chosen >= before) & (chosen < before + shard.num_rows)] - before
        before += shard.num_rows
        if len(inside):
            yield shard.take(pa.array(inside))
