"""Options of the nightly job. They import nothing heavy: the command line reads them first."""

from __future__ import annotations

import datetime
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from stpm.errors import ConfigError
from stpm.options import Names, Options, option
from stpm.scoring.options import CollectionOptions

_DATE = re.compile(r"\{date(?::([^{}]*))?\}")
_HTTP = re.compile(r"https?://(?:[!-~]*@)?(?:[\w.-]+|\[[\da-f:.]+\])(?::\d+)?(?:[/?#][!-~]*)?", re.IGNORECASE)
_UTC = "UTC"
# It has the same year, month and week as the day before, so a pattern of these alone is refused.
_ANY_DAY = datetime.date(2026, 11, 25)
# A century: Python's dates have a first year.
_MAX_NIGHTS = 36_500


@dataclass(frozen=True)
class NightlyOptions(CollectionOptions):
    """The night to score, its images, the models, and the folder of all nights."""

    images: Names = option(
        Names(),
        "each night's images, separated by commas: the sources of the score job, with {date} in them, such as "
        "s3://dump/{date} for s3://dump/2026-11-24, or s3://dump/{date:%Y/%m/%d}",
        required=True,
    )
    out: str = option(
        "",
        "folder of the nights, date=YYYY-MM-DD, and of nightly.html and nightly.json: a folder or a URI",
        required=True,
    )
    fresh: bool = option(False, "remove the rows of the night, and score its images again with the current models")
    date: str = option("", "the night to score, such as 2026-11-24; none: yesterday")
    timezone: str = option(_UTC, "time zone in which yesterday is meant, such as Europe/Berlin")
    look_back: int = option(
        3,
        "also score late images of this many nights before the night scored, each into the folder of its own night",
        minimum=0,
        maximum=_MAX_NIGHTS,
    )
    settle: float = option(
        60.0,
        "leave files that were modified less than this many seconds ago, and may still be being written, to the next "
        "start; 0: take all",
        minimum=0,
        maximum=86_400,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        days = [_ANY_DAY - datetime.timedelta(days=days) for days in range(max(self.look_back, 1) + 1)]
        for source in self.images:
            if len({_put_date(source, day) for day in days}) < len(days):
                raise ConfigError(
                    f"--images is {source!r}, the same on different days; put {{date}} or {{date:%Y/%m/%d}} in it: "
                    "each night has images of its own"
                )
        _ = self._zone
        date = parse_date(self.date)
        if self.date and not date:
            raise ConfigError(f"--date is {self.date!r}; give it as 2026-11-24")
        if date and date.toordinal() <= self.look_back:
            raise ConfigError(f"--date is {self.date}, too early for --look-back; give a later one")

    def night(self, now: datetime.datetime) -> datetime.date:
        """Return the night to score: `date`, or the day before `now`, a time with its time zone.

        Raises:
            ConfigError: if the date is in the future: a night without images would stay on top of the page until then.
        """
        today = now.astimezone(self._zone).date()
        date = parse_date(self.date) or today - datetime.timedelta(days=1)
        if date > today:
            raise ConfigError(
                f"--date is {self.date}, and today is {today} ({self.timezone}); give a day that has begun"
            )
        return date

    def sources(self, date: datetime.date) -> tuple[str, ...]:
        """Return the sources of a night's images."""
        return tuple(_put_date(source, date) for source in self.images)

    @cached_property
    def _zone(self) -> datetime.tzinfo:
        if self.timezone == _UTC:
            # It needs no database of time zones.
            return datetime.timezone.utc
        try:
            return ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ConfigError(
                f"--timezone is {self.timezone!r}, which this machine does not know; give a name such as Europe/Berlin"
            ) from error


@dataclass(frozen=True)
class MonitoringOptions(Options):
    """What the page of the nights tells, and to whom.

    Raises:
        ConfigError: if a value is out of range. The message does not show the webhook's URL.
    """

    nights: int = option(30, "nights on nightly.html and in nightly.json, up to the latest one", minimum=1)
    false_verdict_rate: float = option(
        0.05,
        "probability, 0 to 1, that of all categories in --nights nights any is called watch or act though nothing has "
        "changed",
        above=0,
        below=1,
    )
    webhook: str = option(
        "",
        "http:// or https:// URL to which the night is posted as JSON. As it may hold a secret, set it "
        "in the environment (STPM_WEBHOOK); STPM_WEBHOOK_SECRET there is the key of the signature",
        is_secret=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.webhook and not _is_web_url(self.webhook):
            raise ConfigError("--webhook is not an http:// or https:// URL; its value is not shown here")


def parse_date(text: str) -> datetime.date | None:
    """Parse a date written as 2026-11-24; return None for any other text."""
    with suppress(ValueError):
        date = datetime.date.fromisoformat(text)
        # Newer versions of Python read other forms, such as 20261124.
        if date.isoformat() == text:
            return date
    return None


def _is_web_url(text: str) -> bool:
    with suppress(ValueError):
        # It raises ValueError for a port or an IPv6 address that is none.
        return bool(_HTTP.fullmatch(text)) and urlsplit(text).port != 0
    return False


def _put_date(source: str, date: datetime.date) -> str:
    return _DATE.sub(lambda match: date.strftime(match[1] or "%Y-%m-%d"), source)
