"""The report's page: as text, and in a real browser where one is installed."""

from __future__ import annotations

import dataclasses
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stpm.evaluation.category import evaluate
from stpm.evaluation.curves import Curves, Histogram
from stpm.evaluation.gallery import Tile, galleries
from stpm.evaluation.page import page
from stpm.evaluation.report import Failure, Report, Result
from tests.browser import check_page
from tests.evaluation.runs import PREPROCESSING, result, scored_run, without_student

EVIL = "<img src=x onerror=alert(1)>$\"'</script>"
HISTORY = {"number": [1, 2], "train_loss": [0.5, 0.1], "validation_loss": [0.6, 0.2]}


def evil_report() -> Report:
    """Every text that may come from data is hostile, also those that `safe_name` would refuse."""
    sink = io.BytesIO()
    Image.new("RGB", (328, 160)).save(sink, "JPEG")
    tile = Tile(f"s3://b/{EVIL}/{EVIL}.png", EVIL, 0.5, EVIL, is_anomalous=True, picture=sink.getvalue())
    histogram = Histogram((0.1, 0.5, 1.0), {"good": (2, 1), EVIL: (0, 3)}, 0.6, logarithmic=False)
    results = []
    for name, value in ((EVIL, 0.9), ("b", 0.5), ("bottle", None), ("d", 0.7)):
        made = result(name, 0, value, None)
        figures = dataclasses.replace(
            made.figures,
            curves=Curves(image_roc=((0.0, 0.2, 1.0), (0.0, 0.9, 1.0)), scores=histogram),
            defects={EVIL: made.figures.defects["dent"]},
            undefined={"pixel_auroc": EVIL},
        )
        results.append(Result(made.model, figures, HISTORY, {"Largest scores": [tile], "False alarms": []}))
    return Report(f"s3://b/{EVIL}", results, [Failure(EVIL, EVIL)])


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_whatever_comes_from_data_is_text() -> None:
    tags = Tags(page(evil_report(), [EVIL])).found
    assert [tag for tag, _ in tags].count("script") == 1
    for tag, attributes in tags:
        assert not any(name.startswith("on") for name in attributes), tag
        assert tag != "img" or str(attributes["src"]).startswith("data:image/jpeg;base64,")


def test_the_page_asks_nobody_for_anything() -> None:
    text = page(evil_report())
    for tag, attributes in Tags(text).found:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or ""
            assert value.startswith(("data:", "#")) or not value, (tag, value)
    assert "@import" not in text


def test_ids_of_pictures_do_not_meet() -> None:
    ids = [attributes["id"] for _, attributes in Tags(page(evil_report())).found if attributes.get("id")]
    defined = [name for name in ids if name and not name.startswith(("figure", "axes", "patch", "line", "text"))]
    drawn = [name for name in defined if not name.startswith(("matplotlib", "xtick", "ytick", "legend", "PathColl"))]
    assert len(drawn) == len(set(drawn))


def test_a_report_of_nothing_is_a_page() -> None:
    assert "1 failed" in page(Report("data", [], [Failure("c", "gone")]))


def test_a_real_run_is_a_page(tmp_path: Path) -> None:
    target = scored_run(tmp_path)
    made = result("nut", 0, 0.5, 0.5)
    found = Result(made.model, evaluate(target, "nut", PREPROCESSING), HISTORY, galleries(target, "nut", PREPROCESSING))
    text = page(Report("data", [found], []))
    tags = [tag for tag, _ in Tags(text).found]
    assert tags.count("svg") == 3
    assert tags.count("img") >= 4
    assert " = student " not in text


def test_a_score_that_is_a_sum_says_of_what(tmp_path: Path) -> None:
    target = scored_run(tmp_path, parts=True)
    made = without_student(result("nut", 0, 0.5, 0.5))
    found = Result(made.model, evaluate(target, "nut", PREPROCESSING), {}, galleries(target, "nut", PREPROCESSING))
    (worst, *_) = found.galleries["Largest scores"]
    assert worst.parts == f"student {0.25 * worst.score:.3g} + memory {0.75 * worst.score:.3g}"
    text = page(Report("data", [found], []))
    assert f"{worst.score:.3g} = {worst.parts}" in text
    # There are no losses to draw.
    assert [tag for tag, _ in Tags(text).found].count("svg") == 2


@pytest.fixture(scope="module")
def evil_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(evil_report()))
    return path.as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_in_a_browser_nothing_hostile_runs_and_nothing_overflows(
    browser: Any, evil_page: str, width: int, scheme: str
) -> None:
    check_page(browser, evil_page, width, scheme)


def test_in_a_browser_the_table_sorts_by_mouse_and_by_keyboard(browser: Any, evil_page: str) -> None:
    tab = browser.new_page()
    tab.goto(evil_page)
    names = tab.locator("#figures tbody tr td:first-child")
    assert names.all_inner_texts() == [EVIL, "b", "bottle", "d"]
    header = tab.get_by_role("button", name="image AUROC")
    header.click()
    assert names.all_inner_texts() == ["b", "d", EVIL, "bottle"]
    assert tab.locator("th[aria-sort=ascending]").inner_text() == "image AUROC"
    header.focus()
    tab.keyboard.press("Enter")
    assert names.all_inner_texts() == [EVIL, "d", "b", "bottle"]
    tab.close()
