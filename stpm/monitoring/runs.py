"""The scoring runs of a night: the first one scores what is there, each later one the files that came late.

A run's manifest is fixed before it starts, and a finished run never changes. If a start of the job finds new images, it
adds a run to the night's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

import numpy as np
import pyarrow as pa

from stpm import storage
from stpm.monitoring.night_folder import NightFolder
from stpm.scoring.inputs.manifest import Manifest, contains, read_shard
from stpm.scoring.output import RunOutput
from stpm.scoring.schema import Int64Array


def runs_to_score(
    folder: NightFolder, list_images: Callable[[], Iterator[pa.Table]]
) -> Iterator[tuple[RunOutput, Iterator[pa.Table]]]:
    """Yield the night's unfinished runs, and then a new one for images that no run of the night has, if there are any.

    Score each run before taking the next one: scoring fixes a run's list of images, and the new run has those on none.

    Args:
        folder: of the night.
        list_images: lists the night's images, as tables of schema MANIFEST.

    Yields:
        Where the run writes, and the rows for its manifest, should it have none yet.
    """
    for output in folder.outputs():
        if output.state.is_cleared():
            # Its removal was cut off.
            output.remove()
    for output in folder.manifests():
        if not output.state.is_finished():
            # A run without rows starts over if its options were changed: then its manifest is written anew.
            others = {other: manifest for other, manifest in folder.manifests().items() if other != output}
            yield output, new_rows(list_images(), others)
    manifests = folder.manifests()
    rows = new_rows(list_images(), manifests)
    if first := next(rows, None):
        number = max((int(output.name) for output in manifests), default=0) + 1
        yield folder.output(number), chain([first], rows)


def new_rows(chunks: Iterable[pa.Table], manifests: Mapping[RunOutput, Manifest]) -> Iterator[pa.Table]:
    """Yield the rows of images that are in none of these manifests."""
    listed = np.sort(_listed_ids(manifests))
    for chunk in chunks:
        new = chunk.filter(pa.array(~contains(listed, chunk["image_id"].to_numpy())))
        if new.num_rows:
            yield new


def _listed_ids(manifests: Mapping[RunOutput, Manifest]) -> Int64Array:
    """Read the ids of all images that the manifests list."""
    segments = [each for output, manifest in manifests.items() for each in manifest.segments(output.manifest)]
    shards = [shard.uri for segment in segments for shard in segment.shards]
    ids = storage.in_parallel(lambda uri: read_shard(uri)["image_id"].to_numpy(), shards)
    return np.concatenate([np.empty(0, np.int64), *ids])
