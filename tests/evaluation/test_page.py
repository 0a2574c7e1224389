"""The report's page: as text, and in a real browser where one is installed."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stpm.data.encode import encode_jpeg
from stpm.evaluation.category import read_scores
from stpm.evaluation.charts import draw_charts
from stpm.evaluation.gallery import Gallery, galleries
from stpm.evaluation.report import CategoryResult, Failure, Report
from stpm.method.scales import HeatmapScale
from stpm.metrics.category_metrics import Metric
from stpm.models.record import Decision
from stpm.pages import data_uri
from stpm.pages.tiles import Tile
from tests.browser import EVIL, Tags, check_page, check_tags, open_tab
from tests.conftest import MODELS
from tests.evaluation.runs import REPORT, measured, result, scored_run

HISTORY = {"number": [1, 2], "train_loss": [0.5, 0.1], "validation_loss": [0.6, 0.2]}


@pytest.fixture(scope="module")
def evil_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Render a page whose every text from data is markup, also where `safe_name` would refuse it."""
    jpeg = data_uri("jpeg", encode_jpeg(Image.new("RGB", (192, 160))))
    row = {"uri": f"{EVIL}/{EVIL}.png", "label": EVIL, "score": 0.5, "threshold": 0.6, "is_anomalous": False}
    row |= {"fine_score": None, "coarse_score": None}
    tile = Tile(row, HeatmapScale(0.1, 1.0), jpeg, "", "", (192, 160))
    scores = read_scores(scored_run(tmp_path_factory.mktemp("evil"), types=(EVIL,)))
    results = []
    for name, value in ((EVIL, 0.9), ("b", 0.5), ("bottle", None), ("d", 0.7)):
        made = result(name, 0, value, None)
        metrics = dataclasses.replace(
            made.metrics,
            metrics={**made.metrics.metrics, "pixel_auroc": Metric(undefined=EVIL)},
            defects={EVIL: made.metrics.defects["dent"]},
            found_count=5 if name == "b" else 3,
            defect_count=1000 if name == "b" else 5,
        )
        charts = draw_charts(scores, HISTORY, 2, salt=name)
        model = dataclasses.replace(made.model, decision=Decision(0.6, EVIL) if name == "b" else None)
        shown = {"Missed defects": Gallery([tile], 812), "False alarms": Gallery([], 0)}
        results.append(CategoryResult(model, metrics, charts, shown))
    return Report(f"s3://b/{EVIL}", results, [Failure(EVIL, EVIL)]).page([EVIL])


def test_text_from_data_is_escaped_nothing_is_loaded_and_ids_are_unique(evil_page: str) -> None:
    tags = Tags(evil_page)
    check_tags(tags)
    assert sum(f"The threshold is 0.6, decided by {EVIL} on " in piece for piece in tags.texts) == 1
    assert "@import" not in evil_page
    assert "Missed defects: 1 of 812 shown" in evil_page
    assert "<h3>Falls short</h3>" in evil_page
    ids = [str(attributes["id"]) for _, attributes in tags.found if attributes.get("id")]
    # No text refers to those that matplotlib gives to its groups.
    groups = ("figure", "axes", "patch", "line", "text", "matplotlib", "xtick", "ytick", "legend", "PathColl")
    referred = [each for each in ids if not each.startswith(groups)]
    assert len(referred) == len(set(referred))


def test_the_bar_of_colours_is_in_the_scores_own_units(evil_page: str) -> None:
    page = Tags(evil_page)
    left = [str(attributes["style"]) for tag, attributes in page.found if tag == "i"]
    # Threshold and score: 0.56 and 0.44 of the way from `low` to `good_max`, which is half of the bar.
    positions = [float(each.removeprefix("left: ").removesuffix("%")) for each in left[:2]]
    assert positions == pytest.approx([50 * 0.5 / 0.9, 50 * 0.4 / 0.9], abs=0.3)
    assert "|".join(text for text in page.texts if text.strip()).count("▼|0.1|1|4.6|") == 4


def test_intervals_and_the_weight_of_a_student_with_a_memory_are_shown() -> None:
    made = result("nut", 0, 0.5, 0.5)
    # Below a value is its interval, or with several seeds its deviation.
    assert "0.5000<small>0.400 to 0.600</small>" in Report("data", [made]).page()
    assert "0.5000<small>± 0.3536</small>" in REPORT.page()
    for name, recipe in MODELS.items():
        page = Report("data", [result("nut", 0, 0.5, 0.5, recipe)]).page()
        assert ("<dt>student weight</dt>" in page) == (name in ("student and memory", "two views"))


@pytest.mark.parametrize("views", [False, True])
def test_a_scored_run_is_rendered_with_the_scores_of_its_views(tmp_path: Path, views: bool) -> None:
    category = scored_run(tmp_path, views=views)
    made = result("nut", 0, 0.5, 0.5, MODELS["memory" if views else "student"])
    charts = draw_charts(read_scores(category), {} if views else HISTORY, 2, salt="")
    text = Report(
        "data", [CategoryResult(made.model, measured(category), charts, galleries(category, made.model.heatmap_scale))]
    ).page()
    tags = [tag for tag, _ in Tags(text).found]
    # Without a student there are no losses to draw.
    assert tags.count("image") >= 4
    assert tags.count("svg") == (2 if views else 3) + 2 * text.count('"pair"')
    score = max(row["score"] for row in category.rows().to_pylist())
    shown = f" (fine {0.75 * score:.3g}, coarse {0.25 * score:.3g})" if views else ""
    assert f"score {score:.3g}{shown}, threshold 1, anomalous" in text


def test_in_a_browser_no_markup_runs_and_the_table_sorts_by_mouse_and_keyboard(
    evil_page: str, browser: Any, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    page.write_text(evil_page)
    check_page(browser, page.as_uri())
    tab, _ = open_tab(browser, page.as_uri())
    summary = tab.locator("table").first
    names = summary.locator("tbody td:first-child")
    assert names.all_inner_texts() == [EVIL, "b", "bottle", "d"]
    header = summary.get_by_role("button", name="image AUROC")
    header.click()
    assert names.all_inner_texts() == ["b", "d", EVIL, "bottle"]
    assert tab.locator("th[aria-sort=ascending]").inner_text() == "image AUROC"
    header.focus()
    tab.keyboard.press("Enter")
    assert names.all_inner_texts() == [EVIL, "d", "b", "bottle"]
    # A count is sorted by its share.
    summary.get_by_role("button", name="defects found").click()
    assert names.first.inner_text() == "b"
    tab.close()
