"""nightly.html: as text, and in a real browser where one is installed."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stpm.data.encode import encode_jpeg
from stpm.data.heatmaps import overlay_png
from stpm.line.night import Night
from stpm.line.page import alarm_trend, page
from stpm.method.scales import HeatmapScale
from stpm.pages import data_uri
from stpm.pages.tiles import Tile
from tests.browser import EVIL, Tags, check_page, check_tags
from tests.line.synthetic import make_nights

CREATED = "2026-11-25T02:30:00+00:00"
MANY = [f"product {number:03}" for number in range(500)]


def make_top(text: str) -> list[tuple[Tile, int]]:
    """Make twelve images, of which the first shows a kind of five, and the last can no longer be read."""
    pixels, levels = np.random.default_rng(0).integers(60, 200, (64, 96, 3), np.uint8), np.zeros((256, 384), np.uint8)
    levels[80:160, 100:200] = 200
    shown = {
        "picture": data_uri("jpeg", encode_jpeg(Image.fromarray(pixels).resize((384, 256)))),
        "heatmap": data_uri("png", overlay_png(levels)),
        "size": (384, 256),
    }
    row = {"uri": f"s3://dump/{text}.png", "category": text, "score": 5.0, "threshold": 1.0, "p_value": 0.002}
    row["is_anomalous"] = True
    scale = HeatmapScale(0.0, 1.0)
    return [(Tile(row, scale, **shown), 5), *[(Tile(row, scale, **shown), 1)] * 10, (Tile(row, scale), 1)]


def evil_page() -> str:
    """Render a page whose every text from data is markup."""
    return page(make_nights([EVIL, "b", "bottle", "d"], 5, act=1, watch=2, text=EVIL), EVIL, CREATED, make_top(EVIL))


def test_text_from_data_is_escaped_nothing_is_loaded_and_links_lead_to_files_of_the_nights() -> None:
    tags = Tags(evil_page())
    check_tags(tags, scripts=0)
    links = {attributes["href"] for tag, attributes in tags.found if tag == "a"}
    nights = [f"date=2026-11-{day}" for day in (20, 21, 22, 23, 24)]
    # The second run of a night is unfinished.
    runs = {f"{night}/runs/001/triage.html" for night in nights}
    assert links == {"nightly.json", *runs, *(f"{night}/scores/" for night in nights)}


def test_what_is_to_be_looked_at_is_on_top_and_every_category_in_the_table() -> None:
    nights = make_nights(MANY, 30, act=3, watch=50, unclear=20)
    text = page(nights, "s3://plant/nights", CREATED, make_top("nut"))
    cards = re.findall(r"<h3>(product \d+) <span class=\"level\">([\w ]+)", text)
    assert [level for _, level in cards] == ["act"] * 3 + ["watch"] * 50 + ["cannot tell"] * 7
    assert "13 more are in the table of all categories" in text
    assert (text.count("alarms of this kind"), text.count("the image can no longer be read")) == (1, 1)
    assert text.index("Categories to look at") < text.index("Most anomalous images") < text.index("All 500 categories")
    rows = re.findall(r"<tr><td>(product \d+)</td>", text)
    assert sorted(rows) == MANY
    assert rows[:3] == MANY[:3]
    # A page that opens at once.
    assert len(text) < 2_000_000


@pytest.mark.parametrize(
    ("categories", "unclear", "is_judged", "unfinished", "problem", "shown"),
    [
        (2, 0, True, 0, "", ["None: every category is fine."]),
        (2, 0, True, 0, "the dump is not mounted", ["None: every category is fine."]),
        (2, 2, True, 0, "", []),
        (2, 0, False, 2, "", ["The night has not been judged."]),
        (2, 0, False, 0, "storage is down", ["The night has not been judged."]),
        (0, 0, False, 0, "storage is down", ["The night has not been judged."]),
        (0, 0, False, 0, "", ["There are no images to judge."]),
    ],
)
def test_a_night_without_a_category_to_look_at_tells_whether_it_is_judged(
    categories: int, unclear: int, is_judged: bool, unfinished: int, problem: str, shown: list[str]
) -> None:
    (night,) = make_nights(["a", "b"], 1, act=0, watch=0, unclear=unclear)
    records = {
        name: each if is_judged else replace(each, level="not judged") for name, each in night.categories.items()
    }
    night = replace(night, unfinished=unfinished, problem=problem, categories=records)
    text = page([night if categories else Night(night.date, (), problem=problem)], "s3://nights", CREATED, [])
    texts = ("None: every category is fine.", "The night has not been judged.", "There are no images to judge.")
    assert [each for each in texts if each in text] == shown
    assert ("<b>2</b> cannot tell" in text) == bool(unclear)
    assert "No image is shown: none has a score" in text


def test_a_trend_has_a_point_per_night_by_its_date_and_larger_rates_are_higher_up() -> None:
    nights = make_nights(["nut"], 5, act=0, watch=1)
    del nights[1]
    # A night that knows nothing of a category interrupts its trend.
    nights[1] = replace(nights[1], categories={}, problem="storage is down")
    trend = alarm_trend(nights, "nut")
    points = [[tuple(map(float, point.split(","))) for point in line.split("L")] for line in trend.path.split("M")[1:]]
    assert [[x for x, _ in line] for line in points] == [[4.0], [148.0, 196.0]]
    assert [level for _, _, level, _ in trend.dots] == ["watch", "watch"]
    heights = [44 - y for line in points for _, y in line]
    alarms = [nights[i].categories["nut"].alarms for i in (0, 2, 3)]
    assert np.argsort(heights).tolist() == np.argsort(alarms).tolist()


def test_in_a_browser_no_markup_from_data_runs(browser: Any, tmp_path: Path) -> None:
    many = page(make_nights(MANY, 30, act=3, watch=12), "s3://plant/nights", CREATED, make_top("nut"))
    for name, text in (("evil", evil_page()), ("many", many)):
        (tmp_path / f"{name}.html").write_text(text)
        check_page(browser, (tmp_path / f"{name}.html").as_uri())
