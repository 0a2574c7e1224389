"""nightly.html: the nights as one page that needs no network. Categories to look at are on top."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import NamedTuple

import numpy as np

from stpm import storage
from stpm.data.image_statistics import COMPARED
from stpm.errors import DataError, ModelError
from stpm.line.change import percent
from stpm.line.night import CategoryNight, Night
from stpm.line.night_folder import NightFolder
from stpm.method.scales import HeatmapScale
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.names import as_utf8
from stpm.pages import render
from stpm.pages.tiles import Tile, draw_tile
from stpm.scoring.kinds import Row, group_alarms
from stpm.scoring.ranked_rows import most_anomalous
from stpm.scoring.triage import THREADS

PAGE_FILE = "nightly.html"
_WIDTH, _HEIGHT, _MARGIN = 200, 44, 4
# Maximum number of categories that are not fine and have a card; the table has all.
_MAX_CARDS = 60
# A trend of rates reaches this many times the requested rate or higher, so that noise does not look like a change.
_RATE_RANGE = 3.0
# Images that are shown, and the maximum pixels of their shorter and longer sides.
_TOP_IMAGES, _SIDES = 12, (256, 1024)

log = logging.getLogger(__name__)


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


def page(nights: Sequence[Night], out: str, created: str, top: Sequence[tuple[Tile, int]]) -> str:
    """Render the page about one night or more, oldest first, that are in the folder with this URI.

    Text from data is escaped, nothing is loaded, and no script runs. `top` is that of `top_images`.
    """
    ordered, flagged = nights[-1].ordered_categories(), nights[-1].flagged()
    return render(
        "line/nightly.html",
        nights=nights,
        latest=nights[-1],
        out=out,
        created=created,
        cards=[(name, ordered[name], _card_trends(nights, name)) for name in flagged[:_MAX_CARDS]],
        more_flagged=max(len(flagged) - _MAX_CARDS, 0),
        rows=[(name, category, alarm_trend(nights, name)) for name, category in ordered.items()],
        top=top,
        percent=percent,
        width=_WIDTH,
        height=_HEIGHT,
    )


def top_images(folder: NightFolder, store: ModelStore, count: int) -> list[tuple[Tile, int]]:
    """Draw one image of each kind among a night's most anomalous ones, then others; add how many look like each.

    Returns:
        None, after a warning, if the rows cannot be read.
    """

    @cache
    def read_model(category: str, model_id: str) -> ModelRecord:
        return store.record(category, model_id)

    def draw(kind: Sequence[Row]) -> tuple[Tile, int]:
        row = kind[0]
        with suppress(ModelError):
            model = read_model(row["category"], row["model_id"])
            return draw_tile(row, folder.uri, model.preprocessing, model.heatmap_scale, _SIDES), len(kind)
        return Tile(row, HeatmapScale(0.0, 1.0)), len(kind)

    try:
        found = [row for output in folder.outputs() for row in most_anomalous(output, max(count, _TOP_IMAGES))]
    except (DataError, OSError) as error:
        log.warning(f"{as_utf8(str(error))}; the page shows no images")
        return []
    found = sorted(found, key=lambda row: (row["margin"], row["uri"]), reverse=True)[: max(count, _TOP_IMAGES)]
    return storage.in_parallel(draw, group_alarms(found)[:_TOP_IMAGES], THREADS)


def _card_trends(nights: Sequence[Night], name: str) -> Iterator[Trend]:
    """Draw a category's alarm rate, number of images, median p-value, and the image statistics that changed."""
    latest, number = nights[-1].categories[name], "{:.3g}".format
    yield alarm_trend(nights, name)
    yield _trend(nights, name, "images", lambda each: each.images, "{:,.0f}".format, (0,))
    yield _trend(nights, name, "median p-value", lambda each: each.median_p_value, number, (0, 1), 0.5)
    changed = [each.name for each in latest.changes if each.name in COMPARED and each.name in latest.training_medians]
    for statistic in changed[:2]:

        def median(category: CategoryNight, name: str = statistic) -> float | None:
            return category.medians.get(name)

        expected = latest.training_medians[statistic]
        yield _trend(nights, name, statistic.replace("_", " "), median, number, (), expected)


def alarm_trend(nights: Sequence[Night], name: str) -> Trend:
    """Draw a category's alarm rate, with the requested rate as the expected one."""
    expected = nights[-1].categories[name].false_alarm_rate

    def rate(category: CategoryNight) -> float | None:
        return category.alarm_rate.value if category.alarm_rate else None

    return _trend(nights, name, "alarm rate", rate, percent, (0, min(_RATE_RANGE * expected, 1)), expected)


def _trend(
    nights: Sequence[Night],
    name: str,
    what: str,
    measure: Callable[[CategoryNight], float | None],
    show: Callable[[float], str],
    scale: Sequence[float],
    expected: float | None = None,
) -> Trend:
    """Draw a number of a category over nights.

    Args:
        nights: oldest first.
        what: what the number is.
        measure: returns the number on a night; None for none.
        show: writes it as text.
        scale: numbers that are on the scale even if no night has them.
        expected: the number on good nights; None if there is none.
    """
    values = [measure(each) if (each := night.categories.get(name)) else None for night in nights]
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
            dots.append((x, y(number), level, f"{night.date}: {show(number)}"))
    label = f"{what} {'unknown' if values[-1] is None else show(values[-1])}"
    return Trend(label, path, dots, None if expected is None else y(expected))
