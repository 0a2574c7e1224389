"""What is left of a pass that was cut off: the manifest's rows whose ids no checkpoint holds."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import ray

from stpm import storage
from stpm.scoring import manifest
from stpm.scoring.pipeline import STAGE_CPUS
from stpm.scoring.target import Target

_PENDING = ".pending.parquet"


def remaining_shards(target: Target, whole: int) -> tuple[list[str], int]:
    """URIs of shards that hold what is left, and the number of rows in them. Needs a connection to Ray.

    Args:
        target: of the pass.
        whole: rows of the whole manifest.
    """
    remote = ray.remote(num_cpus=STAGE_CPUS)(_remaining)
    shards, rows = ray.get(remote.remote(target.manifest, whole, target.checkpoint, target.remaining))
    return shards, rows


def _remaining(folder: str, whole: int, checkpoint: str, remaining: str) -> tuple[list[str], int]:
    """In a task, since the ids of a large pass are too many for the driver."""
    storage.remove(remaining)
    committed = [uri for uri, _ in storage.files(checkpoint) if uri.endswith(".parquet")]
    pending = {uri for uri in committed if uri.endswith(_PENDING)}
    committed = [uri for uri in committed if uri not in pending]
    for uri in committed:
        # A store without renames copies and then removes: cut off in between, both are there, and the rows are too.
        if (twin := uri.removesuffix(".parquet") + _PENDING) in pending:
            storage.remove(twin)
    shards = manifest.shards(folder)
    if not committed:
        return shards, whole
    done = np.sort(np.concatenate([storage.read_table(uri)["image_id"].to_numpy() for uri in committed]))
    left, rows = [], 0
    for uri in shards:
        table = storage.read_table(uri)
        kept = table.filter(pa.array(~np.isin(table["image_id"].to_numpy(), done, kind="sort")))
        if kept.num_rows:
            left.append(storage.join(remaining, uri.rsplit("/", 1)[-1]))
            storage.publish(left[-1], storage.parquet(kept))
            rows += kept.num_rows
    return left, rows
