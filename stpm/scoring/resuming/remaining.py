"""The rows that a resumed run has yet to score: those of the manifest whose ids are in no checkpoint."""

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
# CPUs of the task: few enough to start beside another run that holds nearly all CPUs.
_CPUS = 0.1
_PENDING = ".pending.parquet"


def remaining_shards(output: RunOutput) -> list[Shard]:
    """Write the remaining rows as shards and list them. Needs a connection to Ray.

    It runs in a task, because the ids of a large run may not fit the driver's memory.

    Raises:
        DataError: if a checkpoint is damaged.
    """
    remote = ray.remote(num_cpus=_CPUS)(_write_remaining)
    try:
        shards: list[Shard] = ray.get(remote.remote(output.manifest, output.checkpoint, output.remaining))
    except RayTaskError as error:
        # The text of Ray's own error is a traceback.
        raise error.cause from error
    return shards


def _write_remaining(manifest_folder: str, checkpoint: str, remaining: str) -> list[Shard]:
    storage.remove(remaining)
    shards = manifest.shards(manifest_folder)
    committed = _committed_checkpoints(checkpoint)
    if not committed:
        with ThreadPoolExecutor(_READERS) as pool:
            return list(zip(shards, pool.map(storage.count_rows, shards), strict=True))
    written = np.sort(np.concatenate([_read_ids(uri) for uri in committed]))
    result: list[Shard] = []
    for uri in shards:
        table = storage.read_table(uri)
        rows = table.filter(pa.array(~np.isin(table["image_id"].to_numpy(), written, kind="sort")))
        if rows.num_rows:
            copy = storage.join(remaining, uri.rsplit("/", 1)[-1])
            storage.publish(copy, storage.parquet(rows, manifest.BLOCK_ROWS))
            result.append((copy, rows.num_rows))
    return result


def _committed_checkpoints(folder: str) -> list[str]:
    """List the checkpoints whose rows are written.

    Ray commits a checkpoint by renaming it. A store without renames copies and then removes: if that was cut off, both
    names exist, and the rows do too.
    """
    uris = [uri for uri, _ in storage.files(folder) if uri.endswith(".parquet")]
    pending = {uri for uri in uris if uri.endswith(_PENDING)}
    committed = [uri for uri in uris if uri not in pending]
    for uri in committed:
        if (copied_from := uri.removesuffix(".parquet") + _PENDING) in pending:
            storage.remove(copied_from)
    return committed


def _read_ids(checkpoint: str) -> npt.NDArray[np.int64]:
    try:
        ids: npt.NDArray[np.int64] = storage.read_table(checkpoint)["image_id"].to_numpy()
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{checkpoint} is damaged, and the written rows are no longer known ({error}); give another --out, or "
            "--fresh"
        ) from error
    return ids
