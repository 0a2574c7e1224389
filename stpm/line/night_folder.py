"""The folder of one night.

<out>/date=2026-11-24/scores/<number>_*.parquet     the rows of all runs
<out>/date=2026-11-24/heatmaps/<number>/
<out>/date=2026-11-24/runs/<number>/                run.json, manifest, triage.html
<out>/date=2026-11-24/night.json                    stpm.line.night.Night
"""

from __future__ import annotations

import datetime
from dataclasses import replace
from typing import NamedTuple

from stpm import storage
from stpm.errors import DataError
from stpm.line.night import Night
from stpm.line.options import parse_date
from stpm.records import from_json, to_json
from stpm.scoring.inputs.manifest import Manifest, read_manifest
from stpm.scoring.output import RunOutput

_PREFIX = "date="


class NightFolder(NamedTuple):
    """The folder of one night."""

    date: datetime.date
    uri: str

    @classmethod
    def of(cls, out: str, date: datetime.date) -> NightFolder:
        """Return a night's folder in the folder of all nights."""
        return cls(date, storage.join(out, f"{_PREFIX}{date.isoformat()}"))

    @classmethod
    def find_all(cls, out: str) -> list[NightFolder]:
        """List the folders that are named as nights, oldest first; other files and folders are ignored."""
        names = storage.subfolders(out) if storage.exists(out) else []
        dates = (parse_date(name.removeprefix(_PREFIX)) for name in names if name.startswith(_PREFIX))
        return [cls.of(out, date) for date in dates if date]

    @property
    def record(self) -> str:
        """The URI of night.json."""
        return storage.join(self.uri, "night.json")

    @property
    def how_to_start_over(self) -> str:
        """How to score the night again, for people."""
        return (
            f"run the same command with --date {self.date} --fresh, which removes the night's rows and scores it again"
        )

    def read(self) -> Night | None:
        """Read the night's record; None if there is none.

        Raises:
            DataError: if night.json is damaged, or of another version.
        """
        try:
            # The folder may have been renamed.
            return replace(from_json(Night, storage.read(self.record)), date=self.date.isoformat())
        except FileNotFoundError:
            return None
        except ValueError as error:
            reason = f"{self.record} is not a record of a night: {error}"
            raise DataError(f"{reason}; remove it, or {self.how_to_start_over}") from error

    def write(self, night: Night) -> None:
        """Write the night's record."""
        storage.publish(self.record, to_json(night))

    def output(self, number: int) -> RunOutput:
        """Return the output of a run."""
        return RunOutput.named(self.uri, f"{number:03}")

    def outputs(self) -> list[RunOutput]:
        """List the outputs to which a run wrote anything, oldest first."""
        named = [output for output in RunOutput.all_named(self.uri) if output.name.isdecimal()]
        return sorted((output for output in named if output.state.exists()), key=lambda output: int(output.name))

    def manifests(self) -> dict[RunOutput, Manifest]:
        """Read the manifests of the runs whose list of images is fixed, by their output, oldest first."""
        found = {output: read_manifest(output.manifest) for output in self.outputs()}
        return {output: manifest for output, manifest in found.items() if manifest}

    def remove_runs(self) -> None:
        """Remove all that runs wrote, the latest first: after a kill, what is left is a night with fewer runs."""
        for output in reversed(self.outputs()):
            output.remove()
