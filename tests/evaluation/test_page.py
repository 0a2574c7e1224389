"""The report's page: as text, and in a real browser where one is installed."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stpm.data.encode import encode_jpeg
from stpm.evaluation.category import read_scores
from stpm.evaluation.charts import draw_charts
from stpm.evaluation.gallery import Tile, galleries
from stpm.evaluation.report import CategoryResult, Failure, Report
from stpm.metrics.category_metrics import Metric
from stpm.metrics.labelled import LabelledScores
from tests.browser import Tags, check_page
from tests.conftest import MODELS
from tests.evaluation.runs import measured, result, scored_run, without_student

EVIL = "<img src=x onerror=alert(1)>$\"'</script>"
HISTORY = {"number": [1, 2], "train_loss": [0.5, 0.1], "validation_loss": [0.6, 0.2]}


@cache
def evil_report() -> Report:
    """Render a page whose every text from data is markup, also where `safe_name` would refuse it."""
    picture = encode_jpeg(Image.new("RGB", (328, 160)))
    tile = Tile(f"{EVIL}/{EVIL}.png", f"{EVIL}, score 0.5 = {EVIL}, anomalous", picture)
    scores = LabelledScores(
        labels=np.array(["good", "good", EVIL]),
        scores=np.array([0.1, 0.2, 0.9], np.float32),
        is_anomalous=np.array([False, False, True]),
        threshold=0.6,
        pixels={},
        no_pixels=EVIL,
        error_count=0,
        unlabelled_count=0,
        vanished_masks=(f"s3://b/{EVIL}",),
        problems=(),
    )
    results = []
    for name, value in ((EVIL, 0.9), ("b", 0.5), ("bottle", None), ("d", 0.7)):
        made = result(name, 0, value, None)
        metrics = dataclasses.replace(
            made.metrics,
            metrics={**made.metrics.metrics, "pixel_auroc": Metric(undefined=EVIL)},
            defects={EVIL: made.metrics.defects["dent"]},
        )
        charts = draw_charts(scores, HISTORY, 2, salt=name)
        results.append(CategoryResult(made.model, metrics, charts, {"Largest scores": [tile], "False alarms": []}))
    return Report(f"s3://b/{EVIL}", results, [Failure(EVIL, EVIL)])


def test_text_from_data_is_escaped() -> None:
    tags = Tags(evil_report().page([EVIL])).found
    assert [tag for tag, _ in tags].count("script") == 1
    for tag, attributes in tags:
        assert not any(name.startswith("on") for name in attributes), tag
        assert tag != "img" or str(attributes["src"]).startswith("data:image/jpeg;base64,")


def test_the_page_loads_nothing() -> None:
    text = evil_report().page()
    for tag, attributes in Tags(text).found:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or ""
            assert value.startswith(("data:", "#")) or not value, (tag, value)
    assert "@import" not in text


def test_ids_in_charts_are_unique() -> None:
    ids = [attributes["id"] for _, attributes in Tags(evil_report().page()).found if attributes.get("id")]
    defined = [name for name in ids if name and not name.startswith(("figure", "axes", "patch", "line", "text"))]
    drawn = [name for name in defined if not name.startswith(("matplotlib", "xtick", "ytick", "legend", "PathColl"))]
    assert len(drawn) == len(set(drawn))


def test_an_empty_report_is_rendered() -> None:
    assert "1 failed" in Report("data", [], [Failure("c", "gone")]).page()


def test_the_weight_of_the_student_is_shown_where_there_is_a_memory_too() -> None:
    made = result("nut", 0, 0.5, 0.5)
    for name, recipe in MODELS.items():
        found = dataclasses.replace(made, model=dataclasses.replace(made.model, recipe=recipe))
        assert ("<dt>student weight</dt>" in Report("data", [found]).page()) == (name == "student and memory")


def test_a_scored_run_is_rendered(tmp_path: Path) -> None:
    category = scored_run(tmp_path)
    charts = draw_charts(read_scores(category), HISTORY, 2, salt="")
    found = CategoryResult(result("nut", 0, 0.5, 0.5).model, measured(category), charts, galleries(category))
    text = Report("data", [found]).page()
    tags = [tag for tag, _ in Tags(text).found]
    assert tags.count("svg") == 3
    assert tags.count("img") >= 4
    assert " = student " not in text


def test_the_parts_of_a_score_are_shown(tmp_path: Path) -> None:
    category = scored_run(tmp_path, parts=True)
    charts = draw_charts(read_scores(category), {}, 0, salt="")
    made = without_student(result("nut", 0, 0.5, 0.5))
    found = CategoryResult(made.model, measured(category), charts, galleries(category))
    (worst, *_) = found.galleries["Largest scores"]
    score = max(row["score"] for row in category.rows().to_pylist())
    parts = f"student {0.25 * score:.3g} + memory {0.75 * score:.3g}"
    assert f"score {score:.3g} = {parts}" in worst.found
    text = Report("data", [found]).page()
    assert worst.found in text
    # There are no losses to draw.
    assert [tag for tag, _ in Tags(text).found].count("svg") == 2


@pytest.fixture(scope="module")
def evil_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(evil_report().page())
    return path.as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_in_a_browser_no_markup_from_data_runs_and_nothing_overflows(
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
