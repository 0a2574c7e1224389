"""The folder of one night.

<out>/date=2026-11-24/scores/<number>_*.parquet     the rows of all runs
<out>/date=2026-11-24/heatmaps/<number>/
<out>/date=2026-11-24/runs/<number>/                run.json, manifest, triage.html
<out>/date=2026-11-24/night.json                    see stpm/monitoring/nights.py
"""

from __future__ import annotations

import datetime
from typing import NamedTuple

from stpm import storage
from stpm.monitoring.options import parse_date
from stpm.scoring.inputs.manifest import Manifest, read_manifest
from stpm.scoring.output import RunOutput

_PREFIX = "date="


class NightFolder(NamedTuple):
    """The folder of one night."""

    date: datetime.date
    uri: str

    @property
    def record(self) -> str:
        """The record of the night: stpm/monitoring/nights.py."""
        return storage.join(self.uri, "night.json")

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

    def manifests(self) -> dict[RunOutput, Manifest]:
        """Read the manifests of the runs whose list of images is fixed, by their output, oldest first."""
        found = {output: read_manifest(output.manifest) for output in self.outputs()}
        return {output: manifest for output, manifest in found.items() if manifest}

    def how_to_start_over(self) -> str:
        """Say how to score the night again."""
        return (
            f"run the same command with --date {self.date} --fresh, which removes the night's rows and scores it again"
        )

    def output(self, number: int) -> RunOutput:
        """Return the output of a run."""
        return RunOutput.named(self.uri, f"{number:03}")

    def remove_runs(self) -> None:
        """Remove all that runs wrote, the latest first: after a kill, what is left is a night with fewer runs."""
        for output in reversed(self.outputs()):
            output.remove()

    def outputs(self) -> list[RunOutput]:
        """List the outputs to which a run wrote anything, oldest first."""
        outputs = [output for output in RunOutput.all_named(self.uri) if output.name.isdecimal()]
        outputs = [output for output in outputs if output.state.exists()]
        return sorted(outputs, key=lambda output: int(output.name))
