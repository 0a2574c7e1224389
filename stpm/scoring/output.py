"""The files and folders that a run writes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from stpm import storage
from stpm.errors import ConfigError, DataError
from stpm.lease import Fence, check
from stpm.names import safe_name
from stpm.scoring.run_state import RunState

_RUNS = "runs"
# Under any run folder, what `picture_path` returns.
_PICTURE = re.compile(r"/heatmaps/[^/]+/[^/]+/([0-9a-f]{2})/\1[0-9a-f]{14}(?:\.png|_overlay\.jpg)$")


def is_picture(uri: str) -> bool:
    """Return whether a file is a heatmap or an overlay that some run drew, by its name."""
    return bool(_PICTURE.search(uri))


@dataclass(frozen=True)
class RunOutput:
    """The output of one run: rows in `<folder>/scores/<name>_*.parquet`, heatmaps in `<folder>/heatmaps/<name>/`.

    Partitioned, the rows are in `<folder>/scores/category=<category>/<name>_*.parquet`.

    Args:
        folder: URI of the run folder.
        name: of the run, unique in the folder.
        state_folder: URI of the folder for run.json, the manifest and the checkpoints.
        fence: of the process that writes; None: it only reads, or takes no lease.
        attempt: number of the attempt that writes. Later attempts of a run have higher numbers.
    """

    folder: str
    name: str
    state_folder: str
    fence: Fence | None = None
    attempt: int = 0

    @classmethod
    def single(cls, folder: str, fence: Fence | None = None) -> RunOutput:
        """Return the output of the only run of a folder."""
        return cls(folder, "scores", folder, fence)

    @classmethod
    def named(cls, folder: str, name: str, fence: Fence | None = None) -> RunOutput:
        """Return the output of one of several runs in a folder."""
        return cls(folder, name, storage.join(folder, _RUNS, name), fence)

    @classmethod
    def all_named(cls, folder: str) -> list[RunOutput]:
        """List the outputs of all named runs in a folder, by name."""
        parent = storage.join(folder, _RUNS)
        names = storage.subfolders(parent) if storage.exists(parent) else []
        return [cls.named(folder, name) for name in names]

    @classmethod
    def find_all(cls, folder: str) -> list[RunOutput]:
        """Find the outputs of all runs in a folder.

        Raises:
            DataError: if there are none.
        """
        if outputs := cls.all_named(folder):
            return outputs
        output = cls.single(folder)
        if not output.files():
            raise DataError(f"{folder}: no scores here; give the run folder of the score or benchmark job")
        return [output]

    @property
    def is_named(self) -> bool:
        """Whether it is one of several runs in its folder."""
        return self.state_folder != self.folder

    @property
    def state(self) -> RunState:
        """The record of the run, read anew."""
        return RunState(self.state_folder, self.fence)

    @property
    def scores(self) -> str:
        """The folder of the Parquet files."""
        return storage.join(self.folder, "scores")

    @property
    def heatmaps_relative(self) -> str:
        """The folder of the heatmaps, relative to the run folder."""
        return f"heatmaps/{self.name}"

    @property
    def heatmaps(self) -> str:
        """The folder of the heatmaps."""
        return storage.join(self.folder, self.heatmaps_relative)

    def picture_path(self, category: str, image_id: int, suffix: Literal[".png", "_overlay.jpg"]) -> str:
        """Return the path of an image's heatmap or overlay, relative to the run folder."""
        name = f"{image_id & (2**64 - 1):016x}"
        # Divide the pictures among 256 folders: a disk and its tools are slow in one of millions of files.
        return f"{self.heatmaps_relative}/{safe_name(category, 'category')}/{name[:2]}/{name}{suffix}"

    @property
    def manifest(self) -> str:
        """The folder of the manifest's shards."""
        return storage.join(self.state_folder, "manifest")

    @property
    def triage(self) -> str:
        """The page of the most anomalous images."""
        return storage.join(self.state_folder, "triage.html")

    @property
    def segments(self) -> str:
        """The folder of the summaries of committed segments."""
        return storage.join(self.state_folder, "segments")

    @property
    def checkpoints(self) -> str:
        """The folder of the ids and summaries of written rows, by attempt and segment; removed at the end."""
        return storage.join(self.state_folder, "checkpoints")

    @property
    def remaining(self) -> str:
        """The folder of the manifest shards that are yet to be scored, by attempt; removed when the run is finished."""
        return storage.join(self.state_folder, "remaining")

    def segment_summary(self, number: int) -> str:
        """The summary of a segment that this attempt commits."""
        return storage.join(self.segments, f"{number:06}-{self.attempt:06}.json")

    def segment_checkpoints(self, number: int) -> str:
        """The folder of the ids and summaries of a segment's rows that count for this attempt."""
        return storage.join(self.checkpoints, f"{self.attempt:06}", f"{number:06}")

    def segment_remaining(self, number: int) -> str:
        """The folder of the shards of a segment that this attempt has yet to score."""
        return storage.join(self.remaining, f"{self.attempt:06}", f"{number:06}")

    def segments_with_checkpoints(self) -> set[int]:
        """Return the numbers of the segments that have checkpoints of this attempt."""
        return set(_numbered(storage.join(self.checkpoints, f"{self.attempt:06}")))

    def files(self) -> list[str]:
        """List the URIs of the Parquet files that the run wrote."""
        written = storage.files(self.scores)
        return [uri for uri in written if uri.rsplit("/", 1)[-1].startswith(f"{self.name}_")]

    def written_uris(self) -> list[str]:
        """List the files and folders that exist under the names that the run writes to."""
        names = (self.manifest, self.segments, self.checkpoints, self.remaining, self.triage, self.heatmaps)
        return [*self.files(), *(uri for uri in names if storage.exists(uri))]

    def clear(self) -> None:
        """Remove all that earlier runs wrote here.

        Clear the run state first: the next run finds nothing to resume after a kill at any moment.

        Raises:
            ConfigError: if there are files, and no run.json shows that a run wrote them.
        """
        state = self.state
        existing = self.written_uris()
        if existing and not state.exists():
            raise ConfigError(f"{existing[0]} exists, but no {state.uri} shows that a run wrote it; name another --out")
        state.clear()
        for uri in existing:
            check(self.fence)
            storage.remove(uri)

    def remove(self) -> None:
        """Remove all that runs wrote here, and then the mark that a run wrote it."""
        self.clear()
        self.state.forget()

    def clear_attempts(self, end: int) -> None:
        """Remove the checkpoints, and the shards of remaining rows, of the attempts before this number."""
        for folder in (self.checkpoints, self.remaining):
            for number, name in _numbered(folder).items():
                if number < end:
                    storage.remove(storage.join(folder, name))
            storage.remove_empty_folders(folder)


def _numbered(folder: str) -> dict[int, str]:
    """List the folders in a folder whose names are numbers."""
    names = storage.subfolders(folder) if storage.exists(folder) else []
    # In a store, the folder itself may be an object among its children.
    return {int(name): name for name in names if name.isdecimal()}
