"""The record of one night of all categories, as it is stored and shown: counts of its rows, and verdicts."""

from __future__ import annotations

import datetime
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from stpm import storage
from stpm.errors import join_first
from stpm.line.change import LEVELS, Change, Level
from stpm.line.significance import Rate


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of rows of one night.

    Args:
        images: all of them.
        alarms: how many of them are anomalous.
        errors: how many of them have no score, by error kind, the most frequent first.
    """

    images: int
    alarms: int
    errors: dict[str, int]

    @property
    def error_count(self) -> int:
        """The number of rows without a score."""
        return sum(self.errors.values())

    @property
    def scored(self) -> int:
        """The number of rows with a score."""
        return self.images - self.error_count

    @property
    def alarm_rate(self) -> Rate | None:
        """The alarms among the rows with a score; None if there are none."""
        return Rate(self.alarms, self.scored) if self.scored else None

    @property
    def error_rate(self) -> Rate | None:
        """The errors among all rows; None if there are none."""
        return Rate(self.error_count, self.images) if self.images else None


@dataclass(frozen=True, kw_only=True)
class CategoryNight(Counts):
    """One category's rows of one night, and the verdict on it.

    Args:
        model_id: of the model that scored most of the images; "" if none did.
        false_alarm_rate: that was requested, or that is expected at the threshold that a person decided.
        decision: that threshold, for people; "" if there is none.
        median_p_value: about 0.5 on a night of good images; None without scores.
        medians: of image statistics, by name; empty without scores.
        training_medians: the same of the training images; empty if unknown.
        level: the verdict.
        changes: its reasons: causes before their consequences, and large changes before small ones.
    """

    model_id: str
    false_alarm_rate: float
    decision: str = ""
    median_p_value: float | None = None
    medians: dict[str, float] = field(default_factory=dict)
    training_medians: dict[str, float] = field(default_factory=dict)
    level: Level = "not judged"
    changes: tuple[Change, ...] = ()

    @property
    def reasons(self) -> tuple[str, ...]:
        """What changed, for people."""
        return tuple(change.text for change in self.changes)


@dataclass(frozen=True)
class Night:
    """The contents of night.json: one night of all categories.

    Args:
        date: such as 2026-11-24, as in the folder's name.
        sources: absolute URIs of folders, archives or tables of images.
        runs: names of the runs. If there are others, the record is made anew.
        unfinished: images that a run lists and that have no row.
        problem: why something of the night is missing, "" if nothing is.
        error_examples: a few images without a score of each kind: `kind`, `category`, `uri` and `message`.
        pages: names of the runs that have a triage.html: an unfinished run has none.
    """

    date: str
    sources: tuple[str, ...]
    runs: tuple[str, ...] = ()
    unfinished: int = 0
    problem: str = ""
    categories: dict[str, CategoryNight] = field(default_factory=dict)
    error_examples: tuple[dict[str, str], ...] = ()
    pages: tuple[str, ...] = ()

    @property
    def day(self) -> datetime.date:
        """The date."""
        return datetime.date.fromisoformat(self.date)

    @property
    def folder(self) -> str:
        """The name of the folder."""
        return f"date={self.date}"

    @property
    def total(self) -> Counts:
        """The counts of all categories together."""
        every = self.categories.values()
        errors = sum((Counter(each.errors) for each in every), Counter[str]())
        images, alarms = sum(each.images for each in every), sum(each.alarms for each in every)
        return Counts(images=images, alarms=alarms, errors=dict(errors.most_common()))

    @property
    def levels(self) -> dict[str, int]:
        """The number of categories by level, those to act on first."""
        found = Counter(category.level for category in self.categories.values())
        return {level: found[level] for level in LEVELS}

    @property
    def is_judged(self) -> bool:
        """Whether all images of its runs have a row, and every category a verdict."""
        return bool(self.runs) and not self.unfinished and not self.levels["not judged"]

    def ordered_categories(self) -> dict[str, CategoryNight]:
        """Return the categories by name, those to act on first, and of one level those with the largest changes."""

        def key(name: str) -> tuple[int, float, str]:
            category = self.categories[name]
            return LEVELS.index(category.level), -max((each.size for each in category.changes), default=0.0), name

        return {name: self.categories[name] for name in sorted(self.categories, key=key)}

    def flagged(self) -> list[str]:
        """List the names of the categories to look at, in that order."""
        return [name for name, each in self.ordered_categories().items() if each.level not in ("not judged", "fine")]

    def headline(self) -> str:
        """Describe the night in one line."""
        total = self.total
        parts = [f"{total.images} images, {total.alarms} alarms, {total.error_count} errors"]
        if self.unfinished:
            parts.append(f"{self.unfinished} images without a row")
        for level in ("act", "watch", "cannot tell"):
            if names := [name for name, category in self.categories.items() if category.level == level]:
                parts.append(f"{level}: {join_first(names, separator=', ')}")
        parts.append(f"categories fine: {self.levels['fine']}")
        if self.problem:
            parts.append(self.problem)
        return f"{self.date}: {'; '.join(parts)}"

    def values(self, out: str) -> dict[str, Any]:
        """Return the night as nightly.json has it, with what follows from it, if that folder of all nights has it."""
        categories = {}
        for name, category in self.ordered_categories().items():
            rate = category.alarm_rate
            rates = {"alarm_rate": rate and rate.value, "alarm_rate_interval": rate and rate.interval()}
            categories[name] = asdict(category) | rates
        derived = {"folder": storage.join(out, self.folder), "levels": self.levels, "categories": categories}
        return asdict(replace(self, categories={})) | asdict(self.total) | derived
