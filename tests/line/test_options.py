import datetime
from typing import Any

import pytest

from stpm.errors import ConfigError
from stpm.line.options import MonitoringOptions, NightlyOptions
from stpm.options import Names


def make(images: str = "s3://dump/{date}", **options: Any) -> NightlyOptions:
    return NightlyOptions(models="m", images=Names(images.split(",")), out="o", **options)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("s3://dump/{date}", "s3://dump/2026-11-04"),
        ("s3://dump/{date:%Y/%m/%d}/line 1", "s3://dump/2026/11/04/line 1"),
        ("/d/{date:%Y%m%d}/{category}/*.png", "/d/20261104/{category}/*.png"),
        ("{date}/{date:%d}", "2026-11-04/04"),
    ],
)
def test_the_date_is_put_into_the_sources(pattern: str, expected: str) -> None:
    assert make(f"{pattern},x/{{date}}").sources(datetime.date(2026, 11, 4)) == (expected, "x/2026-11-04")


@pytest.mark.parametrize(
    ("zone", "time", "expected"),
    [
        ("UTC", "2026-11-25T00:30:00+00:00", "2026-11-24"),
        ("Europe/Berlin", "2026-11-24T22:30:00+00:00", "2026-11-23"),
        ("Europe/Berlin", "2026-11-24T23:30:00+00:00", "2026-11-24"),
        ("Asia/Tokyo", "2026-11-24T15:30:00+00:00", "2026-11-24"),
        ("America/Los_Angeles", "2026-03-01T07:59:00+00:00", "2026-02-27"),
    ],
)
def test_the_night_is_yesterday_in_the_time_zone(zone: str, time: str, expected: str) -> None:
    now = datetime.datetime.fromisoformat(time)
    assert make(timezone=zone).night(now).isoformat() == expected
    assert make(timezone=zone, date="2020-02-29").night(now) == datetime.date(2020, 2, 29)


def test_a_date_that_is_yet_to_come_in_the_time_zone_is_refused() -> None:
    now = datetime.datetime.fromisoformat("2026-11-24T23:30:00+00:00")
    tomorrow = {"date": "2026-11-25"}
    assert make(timezone="Europe/Berlin", **tomorrow).night(now) == datetime.date(2026, 11, 25)
    with pytest.raises(ConfigError, match=r"date is 2026-11-25, and today is 2026-11-24 \(UTC\)"):
        make(**tomorrow).night(now)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "s3://dump"}, r"images is 's3://dump', the same on different days; put \{date\}"),
        ({"images": "s3://dump/{date:%Y/%m}"}, "the same on different days"),
        ({"images": "s3://dump/{date:week %V}"}, "the same on different days"),
        ({"images": "s3://dump/{date:%a}", "look_back": 7}, "the same on different days"),
        ({"images": "s3://dump/{date},s3://dump"}, r"images is 's3://dump'"),
        ({"date": "24.11.2026"}, "date is '24.11.2026'; give it as 2026-11-24"),
        ({"date": "2026-02-30"}, "date is '2026-02-30'"),
        ({"date": "0001-01-03"}, "date is 0001-01-03, too early for --look-back"),
        ({"timezone": "Mars/Olympus"}, "timezone is 'Mars/Olympus', which this machine does not know"),
        ({"timezone": "../UTC"}, "timezone is '../UTC'"),
        ({"look_back": 1_000_000}, "look-back is 1000000; give at least 0 and at most 36500"),
        ({"max_error_rate": 2.0}, "max-error-rate is 2.0"),
        ({"category": "nut", "category_from": "{category}/{name}"}, "both given"),
    ],
)
def test_invalid_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


@pytest.mark.parametrize(
    "url", ["ftp://host/secret", "https:///secret", "https://h:port/secret", "http://h/sec ret", "http://[::::]/T"]
)
@pytest.mark.parametrize(
    "valid", ["http://h", "HTTPS://me:pass%2Dword@h.example:8080/T0/B1?key=a#b", "http://[::1]:9/secret"]
)
def test_an_invalid_webhook_is_not_shown(url: str, valid: str) -> None:
    assert MonitoringOptions(webhook=valid).webhook == valid
    with pytest.raises(ConfigError) as caught:
        MonitoringOptions(webhook=url)
    assert str(caught.value) == "--webhook is not an http:// or https:// URL; its value is not shown here"


@pytest.mark.parametrize(
    ("name", "value"),
    [("nights", 0), ("false_verdict_rate", 0.0), ("false_verdict_rate", 1.0)],
)
def test_values_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name.replace('_', '-')} is {value}"):
        MonitoringOptions(**{name: value})
