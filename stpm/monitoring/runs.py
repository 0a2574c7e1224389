"""The scoring runs of a night: the first one scores what is there, each later one the files that came late.

A run's manifest is fixed before it starts, and a finished run never changes. If a start of the job finds new images, it
adds a run to the night's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
import pyarrow as pa

from stpm import storage
from stpm.monitoring.night_folder import NightFolder
from stpm.scoring.inputs.manifest import read_manifest, read_shard
from stpm.scoring.output import RunOutput
from stpm.scoring.resuming.remaining import contains
from stpm.scoring.run_state import RunState
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
        if RunState(output.state_folder).is_cleared():
            # Its removal was cut off.
            output.remove()
    outputs = folder.outputs_with_manifest()
    for output in outputs:
        if not RunState(output.state_folder).is_finished():
            # A run without rows starts over if its options were changed.
            yield output, new_rows(list_images(), [other for other in outputs if other != output])
    outputs = folder.outputs_with_manifest()
    rows = new_rows(list_images(), outputs)
    if first := next(rows, None):
        number = max((int(output.name) for output in outputs), default=0) + 1
        yield folder.output(number), chain([first], rows)


def new_rows(chunks: Iterable[pa.Table], outputs: Sequence[RunOutput]) -> Iterator[pa.Table]:
    """Yield the rows of images that are in no manifest of these outputs."""
    listed = np.sort(_listed_ids(outputs))
    for chunk in chunks:
        new = chunk.filter(pa.array(~contains(listed, chunk["image_id"].to_numpy())))
        if new.num_rows:
            yield new


def _listed_ids(outputs: Iterable[RunOutput]) -> Int64Array:
    """Read the ids of all images that the outputs' manifests list."""
    folders = [output.manifest for output in outputs]
    segments = [segment for uri in folders if (manifest := read_manifest(uri)) for segment in manifest.segments(uri)]
    shards = [shard.uri for segment in segments for shard in segment.shards]
    ids = storage.in_parallel(lambda uri: read_shard(uri)["image_id"].to_numpy(), shards)
    return np.concatenate([np.empty(0, np.int64), *ids])
