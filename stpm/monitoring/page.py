"""nightly.html: the nights as one page that needs no network. Categories to look at are on top."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from stpm.monitoring.change import percent
from stpm.monitoring.nights import CategoryRecord, Night, ordered_categories
from stpm.pages import render

_WIDTH, _HEIGHT, _MARGIN = 200, 44, 4
# Maximum number of categories to act on or to watch that have a card; the table has all.
_MAX_CARDS = 60
# A trend of rates reaches at least this many times the requested rate, so that noise does not look like a change.
_RATE_RANGE = 3.0
_LABELS = {
    "brightness": "brightness",
    "contrast": "contrast",
    "sharpness": "sharpness",
    "red_to_green": "red over green",
    "blue_to_green": "blue over green",
    "position_x": "position, left to right",
    "position_y": "position, top to bottom",
    "width": "width, pixels",
    "height": "height, pixels",
}


class Dot(NamedTuple):
    """A night in a trend, in the coordinates of its drawing."""

    x: float
    y: float
    level: str
    title: str


class Trend(NamedTuple):
    """A drawing of one number over nights.

    Args:
        label: what is drawn, and its last value.
        lines: of the drawing's polylines, the points; a night without a value interrupts them.
        dots: nights that were not fine, and the last one.
        expected: height of the line where good nights are, None for no line.
    """

    label: str
    lines: list[str]
    dots: list[Dot]
    expected: float | None


class Card(NamedTuple):
    """A category with its trends."""

    name: str
    record: CategoryRecord
    trends: list[Trend]


def page(nights: Sequence[Night], out: str, created: str) -> str:
    """Render the page. Text from data is escaped, nothing is loaded, and no script runs but the page's own.

    Args:
        nights: one or more, oldest first.
        out: URI of the folder of all nights.
        created: time of writing, for people.
    """
    latest = nights[-1]
    ordered = ordered_categories(latest)
    flagged = [(name, record) for name, record in ordered if record.verdict and record.verdict.level != "fine"]
    return render(
        "monitoring/nightly.html",
        nights=nights,
        latest=latest,
        out=out,
        created=created,
        cards=[Card(name, record, card_trends(nights, name)) for name, record in flagged[:_MAX_CARDS]],
        more_flagged=max(len(flagged) - _MAX_CARDS, 0),
        rows=[Card(name, record, [alarm_trend(nights, name)]) for name, record in ordered],
        percent=percent,
        width=_WIDTH,
        height=_HEIGHT,
    )


def card_trends(nights: Sequence[Night], category: str) -> list[Trend]:
    """Draw a category's alarm rate, number of images, median p-value, and the image statistics that changed."""
    latest = nights[-1].categories[category]
    changes = latest.verdict.changes if latest.verdict else ()
    names = [change.name for change in changes if change.name in _LABELS and change.name in latest.training_medians]
    trend = partial(_trend, nights, category)
    return [
        alarm_trend(nights, category),
        trend(what="images", value=lambda record: float(record.images), show=lambda number: f"{number:,.0f}", low=0.0),
        trend(
            what="median p-value",
            value=lambda record: record.median_p_value,
            show=_short,
            expected=0.5,
            low=0.0,
            high=1.0,
        ),
        *(
            trend(what=_LABELS[name], value=_median(name), show=_short, expected=latest.training_medians[name])
            for name in names[:2]
        ),
    ]


def alarm_trend(nights: Sequence[Night], category: str) -> Trend:
    """Draw a category's alarm rate, with the requested rate as the expected one."""
    rate = nights[-1].categories[category].false_alarm_rate
    return _trend(
        nights,
        category,
        what="alarm rate",
        value=lambda record: record.alarm_rate.value if record.alarm_rate else None,
        show=percent,
        expected=rate,
        low=0.0,
        high=min(_RATE_RANGE * rate, 1.0),
    )


def _median(name: str) -> Callable[[CategoryRecord], float | None]:
    return lambda record: record.medians.get(name)


def _trend(
    nights: Sequence[Night],
    category: str,
    *,
    what: str,
    value: Callable[[CategoryRecord], float | None],
    show: Callable[[float], str],
    expected: float | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Trend:
    """Draw a number over nights, by date; a night without it interrupts the line.

    Args:
        nights: oldest first.
        category: its name.
        what: the number's name.
        value: the number of a night; None for none.
        show: formats it.
        expected: the number on good nights; None if there is none.
        low: a value that the scale reaches down to; None: the smallest shown.
        high: a value that the scale reaches up to; None: the largest shown.
    """
    records = [(night, night.categories.get(category)) for night in nights]
    found = [(night, record, value(record) if record else None) for night, record in records]
    values = [number for _, _, number in found if number is not None]
    ends = [end for end in (*values, expected, low, high) if end is not None] or [0.0]
    bottom, top = min(ends), max(ends)
    first, days = nights[0].day, max((nights[-1].day - nights[0].day).days, 1)

    def x(night: Night) -> float:
        position = (night.day - first).days / days if len(nights) > 1 else 1.0
        return round(_MARGIN + position * (_WIDTH - 2 * _MARGIN), 1)

    def y(number: float) -> float:
        share = (number - bottom) / (top - bottom) if top > bottom else 0.5
        return round(_HEIGHT - _MARGIN - share * (_HEIGHT - 2 * _MARGIN), 1)

    lines: list[list[str]] = [[]]
    dots = []
    for night, record, number in found:
        if number is None:
            lines.append([])
            continue
        lines[-1].append(f"{x(night)},{y(number)}")
        level = record.verdict.level if record and record.verdict else "none"
        if level != "fine" or night is nights[-1]:
            dots.append(Dot(x(night), y(number), level, f"{night.date}: {show(number)}"))
    last = found[-1][2]
    label = f"{what} {'unknown' if last is None else show(last)}"
    return Trend(
        label=label,
        lines=[" ".join(points) for points in lines],
        dots=dots,
        expected=None if expected is None else y(expected),
    )


def _short(value: float) -> str:
    return f"{value:.3g}"
