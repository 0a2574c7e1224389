"""The record of each night, night.json in its folder: counts of its rows, made once, and verdicts."""

from __future__ import annotations

import datetime
from collections import Counter
from dataclasses import dataclass, field

from stpm import storage
from stpm.errors import DataError, join_first
from stpm.method.false_discovery import Discoveries
from stpm.monitoring.change import LEVELS
from stpm.monitoring.drift import Counts, Verdict
from stpm.monitoring.night_folder import NightFolder
from stpm.records import from_json, to_json


@dataclass(frozen=True, kw_only=True)
class CategoryRecord(Counts):
    """One category's night.

    Args:
        median_p_value: about 0.5 on a night of good images; None without scores.
        medians: of image statistics, by name; empty without scores.
        training_medians: the same of the training images; empty if unknown.
        verdict: None until it is given.
    """

    median_p_value: float | None = None
    medians: dict[str, float] = field(default_factory=dict)
    training_medians: dict[str, float] = field(default_factory=dict)
    verdict: Verdict | None = None


@dataclass(frozen=True, kw_only=True)
class ErrorExample:
    """An image that has no score."""

    kind: str
    category: str
    uri: str
    message: str


@dataclass(frozen=True, kw_only=True)
class TopImage:
    """One of the most anomalous images; `picture` is a data URI, "" if the image or its model can no longer be read."""

    uri: str
    category: str
    score: float
    threshold: float
    p_value: float
    is_anomalous: bool
    picture: str


@dataclass(frozen=True)
class Night:
    """The contents of night.json: one night of all categories, and the mark that this job wrote the night's folder.

    Args:
        date: such as 2026-11-24, as in the folder's name.
        sources: of the images.
        runs: names of the runs. If there are others, the record is made anew.
        unfinished: images that a run lists and that have no row.
        problem: why the night is not all done, "" if it is.
        categories: by name.
        error_examples: a few of each kind.
        top: the most anomalous images first.
        discoveries: among all images of the night; None if the job does not look for them.
        pages: names of the runs that have a triage.html: an unfinished run has none.
    """

    date: str
    sources: tuple[str, ...]
    runs: tuple[str, ...] = ()
    unfinished: int = 0
    problem: str = ""
    categories: dict[str, CategoryRecord] = field(default_factory=dict)
    error_examples: tuple[ErrorExample, ...] = ()
    top: tuple[TopImage, ...] = ()
    discoveries: Discoveries | None = None
    pages: tuple[str, ...] = ()

    @property
    def day(self) -> datetime.date:
        """The date."""
        return datetime.date.fromisoformat(self.date)

    @property
    def fdr(self) -> float:
        """The false discovery rate of the discoveries, 0 for none."""
        return self.discoveries.rate if self.discoveries else 0.0

    @property
    def images(self) -> int:
        """Count the rows."""
        return sum(record.images for record in self.categories.values())

    @property
    def scored(self) -> int:
        """Count the rows with a score."""
        return self.images - self.error_count

    @property
    def is_judged(self) -> bool:
        """Return whether all images of its runs have a row, and every category a verdict."""
        return bool(self.runs) and not self.unfinished and all(record.verdict for record in self.categories.values())

    @property
    def alarms(self) -> int:
        """Count the anomalous images."""
        return sum(record.alarms for record in self.categories.values())

    @property
    def errors(self) -> dict[str, int]:
        """Count the rows without a score by error kind, the most frequent first."""
        return dict(sum((Counter(record.errors) for record in self.categories.values()), Counter[str]()).most_common())

    @property
    def error_count(self) -> int:
        """Count the rows without a score."""
        return sum(self.errors.values())

    @property
    def levels(self) -> dict[str, int]:
        """Count the categories by level."""
        found = Counter(record.verdict.level for record in self.categories.values() if record.verdict)
        return {level: found[level] for level in reversed(LEVELS)}


def headline(night: Night) -> str:
    """Describe a night in one line."""
    flagged = {
        level: [name for name, record in night.categories.items() if record.verdict and record.verdict.level == level]
        for level in ("act", "watch")
    }
    parts = [
        f"{night.images} images, {night.alarms} alarms, {night.error_count} errors",
        *([f"{night.unfinished} images without a row"] if night.unfinished else []),
        *(f"{level}: {join_first(names, separator=', ')}" for level, names in flagged.items() if names),
        f"categories fine: {night.levels['fine']}",
        *([night.problem] if night.problem else []),
    ]
    return f"{night.date}: {'; '.join(parts)}"


def ordered_categories(night: Night) -> list[tuple[str, CategoryRecord]]:
    """List the categories of a night: those to act on first, then those to watch, large changes before small ones."""
    order = {"act": 0, "watch": 1, "fine": 3}

    def key(item: tuple[str, CategoryRecord]) -> tuple[int, float, str]:
        name, record = item
        if not record.verdict:
            return 2, 0.0, name
        return order[record.verdict.level], -max((change.size for change in record.verdict.changes), default=0.0), name

    return sorted(night.categories.items(), key=key)


def read_night(folder: NightFolder) -> Night | None:
    """Read a night's record; None if its folder has none.

    Raises:
        DataError: if night.json is damaged, of another version, or of another date.
    """
    uri = folder.record
    try:
        night = from_json(Night, storage.read(uri))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(
            f"{uri} is not a record of a night: {error}; remove it, or {folder.how_to_start_over()}"
        ) from error
    if night.date != folder.date.isoformat():
        raise DataError(f"{uri} is the record of another night, {night.date}; remove it, or rename its folder")
    return night


def write_night(folder: NightFolder, night: Night) -> None:
    """Write a night's record."""
    storage.publish(folder.record, to_json(night))
