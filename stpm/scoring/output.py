"""The files and folders that a run writes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from stpm import storage
from stpm.errors import ConfigError, DataError
from stpm.lease import Fence, check
from stpm.names import safe_name
from stpm.scoring.run_state import RunState

PictureSuffix = Literal[".png", "_overlay.jpg", "_regions.png"]
# Under any run folder, what `picture_path` returns.
_PICTURE = re.compile(r"/heatmaps/[^/]+/[^/]+/([0-9a-f]{2})/\1[0-9a-f]{14}(?:\.png|_overlay\.jpg|_regions\.png)$")


def is_picture(uri: str) -> bool:
    """Return whether a file is a heatmap, an overlay or a mask that some run drew, by its name."""
    return bool(_PICTURE.search(uri))


@dataclass(frozen=True)
class RunOutput:
    """The output of one run: rows in `<folder>/scores/<name>_*.parquet`, heatmaps in `<folder>/heatmaps/<name>/`.

    Args:
        folder: URI of the run folder.
        name: of the run, unique in the folder.
        state_folder: URI of the folder for run.json, the manifest and the summaries.
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
        return cls(folder, name, storage.join(folder, "runs", name), fence)

    @classmethod
    def all_named(cls, folder: str) -> list[RunOutput]:
        """List the outputs of all named runs in a folder, by name."""
        return [cls.named(folder, name) for name in _subfolders(storage.join(folder, "runs"))]

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

    def with_attempt(self, attempt: int) -> RunOutput:
        """Return the output as another attempt writes it."""
        return replace(self, attempt=attempt)

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
    def heatmaps(self) -> str:
        """The folder of the heatmaps."""
        return storage.join(self.folder, "heatmaps", self.name)

    def picture_path(self, category: str, image_id: int, suffix: PictureSuffix) -> str:
        """Return the path of an image's heatmap, overlay or mask, relative to the run folder."""
        name = f"{image_id & (2**64 - 1):016x}"
        # Divide the pictures among 256 folders: a disk and its tools are slow in one of millions of files.
        return f"heatmaps/{self.name}/{safe_name(category, 'category')}/{name[:2]}/{name}{suffix}"

    @property
    def manifest(self) -> str:
        """The folder of the manifest's shards."""
        return storage.join(self.state_folder, "manifest")

    @property
    def triage(self) -> str:
        """The page of the most anomalous images."""
        return storage.join(self.state_folder, "triage.html")

    @property
    def coco(self) -> str:
        """The anomalous images and their regions, for tools that label images."""
        return storage.join(self.state_folder, "alarms.coco.json")

    @property
    def summaries(self) -> str:
        """The folder of the summaries of written rows, of all attempts; see `stpm.scoring.written_rows`."""
        return storage.join(self.state_folder, "summaries")

    @property
    def attempt_summaries(self) -> str:
        """The folder of the summaries that count for this attempt."""
        return storage.join(self.summaries, f"{self.attempt:06}")

    def task_summaries(self, segment: int) -> str:
        """The folder of the summaries of a segment's rows, one for each task that wrote some."""
        return storage.join(self.attempt_summaries, f"{segment:06}")

    def segment_summary(self, segment: int) -> str:
        """The sum of several summaries of a segment's rows."""
        return f"{self.task_summaries(segment)}.json"

    def files(self) -> list[str]:
        """List the URIs of the Parquet files that the run wrote."""
        written = storage.files(self.scores)
        return [uri for uri in written if uri.rsplit("/", 1)[-1].startswith(f"{self.name}_")]

    def files_of(self, tasks: Iterable[str]) -> list[str]:
        """Return the URIs of the Parquet files that tasks wrote: one each, named after the task."""
        return [storage.join(self.scores, f"{task}.parquet") for task in tasks]

    def written_uris(self) -> list[str]:
        """List the files and folders that exist under the names that the run writes to."""
        tables = (storage.join(self.state_folder, f"rows.{kind}") for kind in ("csv", "xlsx"))
        names = (self.manifest, self.summaries, self.triage, self.coco, self.heatmaps, *tables)
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
        storage.remove(self.state.uri)

    def remove_earlier_attempts(self) -> None:
        """Remove the summaries that counted for earlier attempts."""
        for name in _subfolders(self.summaries):
            # In a store, the folder itself may be an object among its children.
            if name.isdecimal() and int(name) < self.attempt:
                storage.remove(storage.join(self.summaries, name))


def _subfolders(folder: str) -> list[str]:
    return storage.subfolders(folder) if storage.exists(folder) else []
