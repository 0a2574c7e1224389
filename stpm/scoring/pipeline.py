"""The chain of stages: manifest → decode (CPU tasks) → teacher and students (actors) → PNG (CPU tasks) → Parquet."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy
from ray.data.datasource import FilenameProvider

from stpm import storage
from stpm.calibration import check_rate
from stpm.errors import ConfigError, ModelError
from stpm.images import View
from stpm.models import ModelStore
from stpm.options import option
from stpm.scoring.decode import Decode
from stpm.scoring.heatmaps import WriteHeatmaps
from stpm.scoring.scorer import Scorer

# Ray's read and repartition tasks ask for a whole CPU each: if the actors took all, nothing would ever move.
_SPARE_CPUS = 1
_STAGE_CPUS = 0.25
_BLOCK_ROWS = 64


@dataclass(frozen=True)
class ScoreOptions:
    """How images are scored.

    Raises:
        ConfigError: if a value cannot be.
    """

    false_alarm_rate: float = option(
        0.01,
        "share of good images that may be called anomalous, 0 to 1; sets the threshold from held-out normals",
    )
    batch_size: int = option(16, "images per forward pass")
    scorers: int = option(0, "actors that score; 0: one per GPU, or without GPUs one per CPU core")

    def __post_init__(self) -> None:
        check_rate(self.false_alarm_rate)
        if self.batch_size < 1:
            raise ConfigError(f"batch-size is {self.batch_size}; give at least 1")
        if self.scorers < 0:
            raise ConfigError(f"scorers is {self.scorers}; give 1 or more, or 0 to take what the cluster has")


@dataclass(frozen=True)
class Target:
    """Where a pass writes: `<out>/scores/<name>_*.parquet`, and `<out>/heatmaps/<name>/` if pictures are wanted."""

    out: str
    name: str
    heatmaps: bool = True
    raw_maps: bool = False

    @property
    def scores(self) -> str:
        return storage.join(self.out, "scores")

    def files(self) -> list[str]:
        """URIs of the Parquet files that a pass of this name wrote."""
        written = [uri for uri, _ in storage.files(self.scores)]
        return [uri for uri in written if uri.rsplit("/", 1)[-1].startswith(f"{self.name}_")]

    def clear(self) -> None:
        """Remove what an earlier pass of this name left, whole or in part."""
        for uri in self.files():
            storage.remove(uri)
        storage.remove(storage.join(self.out, "heatmaps", self.name))


@dataclass(frozen=True)
class ScorerPool:
    """The actors that score: how many, and what each takes of its node."""

    size: int
    num_cpus: float
    num_gpus: float

    @classmethod
    def of(cls, scorers: int, resources: dict[str, float], blocks: int) -> ScorerPool:
        """The pool for a cluster and a number of blocks to score.

        Raises:
            ConfigError: if the wanted scorers do not fit.
        """
        cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        if cpus <= _SPARE_CPUS:
            raise ConfigError(f"the cluster has {cpus} CPUs; scoring needs {_SPARE_CPUS} beside one for the scorers")
        most = gpus or cpus
        if scorers > most:
            raise ConfigError(f"{scorers} scorers do not fit {most} {'GPUs' if gpus else 'CPU cores'}; lower --scorers")
        size = min(scorers or most, max(blocks, 1))
        # One thread each: on a CPU one actor per core beats fewer with more threads.
        share = (cpus - _SPARE_CPUS) / max(size, cpus)
        return cls(size, share, 1.0 if gpus else 0.0)


def score_manifest(manifest: pa.Table, store: ModelStore, options: ScoreOptions, target: Target) -> None:
    """Score every row of a manifest and write one output row each, none for none. Needs a connection to Ray.

    Args:
        manifest: of schema MANIFEST.
        store: the models; rows of a category that has none become rows with an error.
        options: how.
        target: where to.

    Raises:
        ModelError: if no row's category has a model.
        ConfigError: if the scorers do not fit the cluster.
    """
    if not manifest.num_rows:
        target.clear()
        return
    views = _views(manifest, store)
    pool = ScorerPool.of(options.scorers, ray.cluster_resources(), -(-manifest.num_rows // _BLOCK_ROWS))
    target.clear()
    manifest_uri = storage.join(target.out, "manifests", f"{target.name}.parquet")
    storage.publish(manifest_uri, storage.parquet(manifest))
    filesystem, path = storage.arrow_filesystem(manifest_uri)
    out_filesystem, out_path = storage.arrow_filesystem(target.scores)
    rows = (
        ray.data.read_parquet(path, filesystem=filesystem, num_cpus=_STAGE_CPUS)
        .repartition(target_num_rows_per_block=_BLOCK_ROWS)
        .map_batches(
            Decode(views).__call__,
            batch_format="pyarrow",
            batch_size=options.batch_size,
            num_cpus=_STAGE_CPUS,
        )
        .map_batches(
            Scorer,
            fn_constructor_args=(store.uri, options.false_alarm_rate, target.raw_maps),
            compute=ActorPoolStrategy(size=pool.size),
            batch_format="pyarrow",
            batch_size=options.batch_size,
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
        )
        .map_batches(
            WriteHeatmaps(target.out, f"heatmaps/{target.name}", target.heatmaps).__call__,
            batch_format="pyarrow",
            batch_size=options.batch_size,
            num_cpus=_STAGE_CPUS,
        )
    )
    rows.write_parquet(
        out_path,
        filesystem=out_filesystem,
        filename_provider=FilenameProvider(target.name, "parquet"),
        ray_remote_args={"num_cpus": _STAGE_CPUS},
    )


def _views(manifest: pa.Table, store: ModelStore) -> dict[str, View]:
    views = {}
    problems = []
    for category in sorted(set(manifest["category"].to_pylist())):
        try:
            views[category] = store.record(category).recipe.view
        except ModelError as error:
            problems.append(str(error))
    if not views:
        raise ModelError("; ".join(problems))
    return views
