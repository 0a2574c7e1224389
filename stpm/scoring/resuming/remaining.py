"""What is left of a pass that was cut off: the manifest's rows whose ids no checkpoint holds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray.exceptions import RayTaskError

from stpm import storage
from stpm.errors import DataError
from stpm.scoring.inputs import manifest
from stpm.scoring.inputs.manifest import Shard
from stpm.scoring.output import RunOutput

_READERS = 16
# Where another pass holds nearly all CPUs there is still room for this.
_CPUS = 0.1
_PENDING = ".pending.parquet"


def remaining_shards(output: RunOutput) -> list[Shard]:
    """Shards that hold what is left of a pass. Needs a connection to Ray.

    Raises:
        DataError: if a checkpoint is damaged.
    """
    remote = ray.remote(num_cpus=_CPUS)(_remaining)
    try:
        shards: list[Shard] = ray.get(remote.remote(output.manifest, output.checkpoint, output.remaining))
    except RayTaskError as error:
        # Ray's own text would be its traceback.
        raise error.cause from error
    return shards


def _remaining(folder: str, checkpoint: str, remaining: str) -> list[Shard]:
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
        with ThreadPoolExecutor(_READERS) as pool:
            return list(zip(shards, pool.map(storage.count_rows, shards), strict=True))
    done = np.sort(np.concatenate([_ids(uri) for uri in committed]))
    left: list[Shard] = []
    for uri in shards:
        table = storage.read_table(uri)
        kept = table.filter(pa.array(~np.isin(table["image_id"].to_numpy(), done, kind="sort")))
        if kept.num_rows:
            left.append((storage.join(remaining, uri.rsplit("/", 1)[-1]), kept.num_rows))
            storage.publish(left[-1][0], storage.parquet(kept, manifest.BLOCK_ROWS))
    return left


def _ids(checkpoint: str) -> npt.NDArray[np.int64]:
    try:
        ids: npt.NDArray[np.int64] = storage.read_table(checkpoint)["image_id"].to_numpy()
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{checkpoint} is damaged, and with it what is known of the rows that are written ({error}); give "
            "another --out, or --fresh"
        ) from error
    return ids
