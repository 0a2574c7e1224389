"""nightly.html: the nights as one page that needs no network. Categories to look at are on top."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from stpm.data.image_statistics import COMPARED
from stpm.line.change import percent
from stpm.line.night import Night
from stpm.pages import render

_WIDTH, _HEIGHT, _MARGIN = 200, 44, 4
# Maximum number of categories that are not fine and have a card; the table has all.
_MAX_CARDS = 60
# A trend of rates reaches this many times the requested rate or higher, so that noise does not look like a change.
_RATE_RANGE = 3.0


class Trend(NamedTuple):
    """A drawing of one number over nights, as SVG.

    Args:
        label: what is drawn, and its last value.
        path: through the nights by date; one without a value interrupts it.
        dots: x, y, level and title of the nights that were not fine, and of the last one.
        expected: height of the line where good nights are, None for no line.
    """

    label: str
    path: str
    dots: list[tuple[float, float, str, str]]
    expected: float | None


def page(nights: Sequence[Night], out: str, created: str) -> str:
    """Render the page about one night or more, oldest first, that are in the folder with this URI.

    Text from data is escaped, nothing is loaded, and no script runs but the page's own.
    """
    ordered = nights[-1].ordered_categories()
    flagged = [(name, category) for name, category in ordered if category.level not in (None, "fine")]
    return render(
        "line/nightly.html",
        nights=nights,
        latest=nights[-1],
        out=out,
        created=created,
        cards=[(name, category, _card_trends(nights, name)) for name, category in flagged[:_MAX_CARDS]],
        more_flagged=max(len(flagged) - _MAX_CARDS, 0),
        rows=[(name, category, alarm_trend(nights, name)) for name, category in ordered],
        percent=percent,
        width=_WIDTH,
        height=_HEIGHT,
    )


def _card_trends(nights: Sequence[Night], name: str) -> Iterator[Trend]:
    """Draw a category's alarm rate, number of images, median p-value, and the image statistics that changed."""
    latest, number = nights[-1].categories[name], "{:.3g}".format
    found = [night.categories.get(name) for night in nights]
    yield alarm_trend(nights, name)
    yield _trend(nights, name, "images", [each.images if each else None for each in found], "{:,.0f}".format, (0,))
    middles = [each.median_p_value if each else None for each in found]
    yield _trend(nights, name, "median p-value", middles, number, (0, 1), 0.5)
    changes = latest.verdict.changes if latest.verdict else ()
    changed = [each.name for each in changes if each.name in COMPARED and each.name in latest.training_medians]
    for statistic in changed[:2]:
        medians = [each.medians.get(statistic) if each else None for each in found]
        expected = latest.training_medians[statistic]
        yield _trend(nights, name, statistic.replace("_", " "), medians, number, (), expected)


def alarm_trend(nights: Sequence[Night], name: str) -> Trend:
    """Draw a category's alarm rate, with the requested rate as the expected one."""
    expected = nights[-1].categories[name].false_alarm_rate
    rates = [each.alarm_rate if (each := night.categories.get(name)) else None for night in nights]
    values = [rate.value if rate else None for rate in rates]
    return _trend(nights, name, "alarm rate", values, percent, (0, min(_RATE_RANGE * expected, 1)), expected)


def _trend(
    nights: Sequence[Night],
    name: str,
    what: str,
    values: Sequence[float | None],
    show: Callable[[float], str],
    scale: Sequence[float],
    expected: float | None = None,
) -> Trend:
    """Draw a number of a category over nights.

    Args:
        nights: oldest first.
        what: what the number is.
        values: the number on each night; None for none.
        show: writes it as text.
        scale: numbers that are on the scale even if no night has them.
        expected: the number on good nights; None if there is none.
    """
    ends = [end for end in (*values, expected, *scale) if end is not None] or [0.0]
    # A single value is in the middle, and a single night at the right.
    low, high = (min(ends), max(ends)) if min(ends) < max(ends) else (ends[0] - 1, ends[0] + 1)
    last = nights[-1].day.toordinal()
    first = min(nights[0].day.toordinal(), last - 1)

    def y(number: float) -> float:
        return round(float(np.interp(number, [low, high], [_HEIGHT - _MARGIN, _MARGIN])), 1)

    path, step = "", "M"
    dots: list[tuple[float, float, str, str]] = []
    for night, number in zip(nights, values, strict=True):
        if number is None:
            step = "M"
            continue
        x = round(float(np.interp(night.day.toordinal(), [first, last], [_MARGIN, _WIDTH - _MARGIN])), 1)
        path, step = f"{path}{step}{x},{y(number)}", "L"
        level = night.categories[name].level
        if level != "fine" or night is nights[-1]:
            dots.append((x, y(number), level or "none", f"{night.date}: {show(number)}"))
    label = f"{what} {'unknown' if values[-1] is None else show(values[-1])}"
    return Trend(label, path, dots, None if expected is None else y(expected))
