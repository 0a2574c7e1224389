"""Where a pass writes."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.dataset as ds

from stpm import storage
from stpm.errors import DataError
from stpm.scoring.options import Heatmaps, HeatmapsIn, PartitionBy
from stpm.scoring.resuming.run_state import RunState
from stpm.scoring.schema import OUTPUT

_PASSES = "passes"
# Without this a category named 007 would be read as a number.
_HIVE = ds.partitioning(pa.schema([("category", pa.string())]), flavor="hive")


@dataclass(frozen=True)
class RunOutput:
    """Where a pass writes: `<out>/scores/<name>_*.parquet`, and `<out>/heatmaps/<name>/` if pictures are wanted.

    Partitioned, the rows are in `<out>/scores/category=<category>/<name>_*.parquet`.

    `home` is the folder of the pass's own record and state: the run folder, or one of several in it.
    """

    out: str
    name: str
    home: str
    heatmaps: Heatmaps = "all"
    raw_maps: bool = False
    overlays: bool = False
    heatmaps_in: HeatmapsIn = "files"
    partition_by: PartitionBy = "none"

    @classmethod
    def alone(cls, out: str) -> RunOutput:
        """The one pass of a run folder."""
        return cls(out, "scores", out)

    @classmethod
    def among(cls, out: str, name: str) -> RunOutput:
        """One of several passes of a run folder, whose figures are wanted."""
        return cls(out, name, storage.join(out, _PASSES, name), raw_maps=True)

    @classmethod
    def found(cls, out: str) -> list[RunOutput]:
        """The passes that a run folder holds.

        Raises:
            DataError: if there is none.
        """
        if storage.exists(storage.join(out, _PASSES)):
            return [cls.among(out, name) for name in storage.children(storage.join(out, _PASSES))]
        output = cls.alone(out)
        if not output.files():
            raise DataError(f"{out}: no scores here; give the run folder of the score or benchmark job")
        return [output]

    @property
    def scores(self) -> str:
        return storage.join(self.out, "scores")

    @property
    def manifest(self) -> str:
        """The folder of the manifest's shards."""
        return storage.join(self.home, "manifest")

    @property
    def triage(self) -> str:
        """The page of the most anomalous images."""
        return storage.join(self.home, "triage.html")

    @property
    def checkpoint(self) -> str:
        """The folder of what says which rows are written, while the pass runs."""
        return storage.join(self.home, "checkpoint")

    @property
    def remaining(self) -> str:
        """The folder of the shards of what is left, while the pass runs."""
        return storage.join(self.home, "remaining")

    def files(self) -> list[str]:
        """URIs of the Parquet files that the pass wrote."""
        written = [uri for uri, _ in storage.files(self.scores)]
        return [uri for uri in written if uri.rsplit("/", 1)[-1].startswith(f"{self.name}_")]

    def dataset(self) -> ds.Dataset:
        """The rows that the pass wrote."""
        filesystem, folder = storage.arrow_filesystem(self.scores)
        names = [uri.removeprefix(f"{self.scores}/") for uri in self.files()]
        return ds.dataset(
            [f"{folder}/{name}" for name in names],
            schema=None if names else OUTPUT,
            filesystem=filesystem,
            format="parquet",
            partitioning=_HIVE if any("/" in name for name in names) else None,
            partition_base_dir=folder,
        )

    def occupied(self) -> list[str]:
        """What there is under the names that a pass writes to."""
        pictures = storage.join(self.out, "heatmaps", self.name)
        names = (self.manifest, self.checkpoint, self.remaining, self.triage, pictures)
        return [*self.files(), *(uri for uri in names if storage.exists(uri))]

    def clear(self) -> None:
        """Remove what earlier runs of the pass left, whole or in part.

        Cut off anywhere, it leaves no pass that a next run could take up.
        """
        RunState(self.home).clear()
        for uri in self.files():
            storage.remove(uri)
        storage.remove(storage.join(self.out, "heatmaps", self.name))
        for uri in (self.manifest, self.triage):
            storage.remove(uri)
        self.clear_state()

    def clear_state(self) -> None:
        """Remove what only an unfinished pass needs."""
        storage.remove(self.checkpoint)
        storage.remove(self.remaining)
