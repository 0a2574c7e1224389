import base64
import dataclasses
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stpm import storage
from stpm.data.heatmaps import palette_png
from stpm.line.feedback import Marks, read_marks
from stpm.models.record import Decision
from stpm.scoring.output import RunOutput
from stpm.scoring.ranked_rows import most_anomalous
from stpm.scoring.triage import write_triage
from tests.browser import Tags, check_page, open_tab
from tests.conftest import make_preprocessing
from tests.datasets import encode_image, make_output, write_rows
from tests.evaluation.runs import result
from tests.scoring.test_kinds import blobs

EVIL = "/nowhere/<img src=x onerror=alert(1)>&\"'.png"
DECISION = Decision(100.0, "ann", EVIL)
# A person decided the threshold of one model.
NUT = result("nut", 0, None, None).model
MODELS = {"nut": NUT, "a b#c": dataclasses.replace(NUT, category="a b#c", decision=DECISION)}


@pytest.fixture
def output(tmp_path: Path) -> RunOutput:
    """A hundred rows of two models with different thresholds, one of them with an error, one with an evil name."""
    output = RunOutput.single(str(tmp_path))
    columns = make_output(100).to_pydict()
    for i in range(100):
        category = ("nut", "a b#c")[i % 2]
        columns["uri"][i] = EVIL if i == 99 else f"/nowhere/{i}.png"
        columns["category"][i] = category
        columns["threshold"][i] = 1.0 if category == "nut" else 100.0
        columns["score"][i] = None if i == 0 else (i / 50) * columns["threshold"][i]
        if category == "nut" and i:
            columns["coarse_score"][i], columns["fine_score"][i] = 0.25, columns["score"][i] - 0.25
        columns["p_value"][i] = None if i == 0 else 0.02
        columns["is_anomalous"][i] = None if i == 0 else i > 50
        columns["peak_x"][i] = columns["peak_y"][i] = i
        columns["heatmap"][i] = f"heatmaps/scores/{category}/{i}.png" if i % 10 else ""
        if i in (97, 98):
            path, data = tmp_path / f"{i}.tar", encode_image(np.full((20, 40, 3), 90, np.uint8))
            path.write_bytes(bytes(512 * i) + data)
            # An image is found by its position: no header names it.
            columns["uri"][i] = f"{path}#{i}.png"
            columns["archive_start"][i], columns["archive_length"][i] = 512 * i, len(data)
            storage.publish(str(tmp_path / columns["heatmap"][i]), palette_png(np.full((64, 64), 255, np.uint8)))
    rows = make_output(100, **columns)
    write_rows(output, rows.slice(0, 60))
    write_rows(output, rows.slice(60), 1)
    return output


def write_page(output: RunOutput, max_images: int) -> None:
    write_triage(output, max_images, MODELS)


@pytest.mark.parametrize(
    ("scores", "thresholds", "are_scaled", "order"),
    [
        *(([-3, 7, -0.75, 0, 2.5, -0.25], [level] * 6, False, [7, 2.5, 0, -0.25]) for level in (2.0, 0.0, -0.5)),
        # Scores of views have one scale: by their difference to the threshold.
        ([9.5, 12.25, 3], [0.1, 1.5, -2], True, [12.25, 9.5, 3]),
    ],
)
def test_larger_scores_come_first_for_any_sign_of_the_threshold(
    tmp_path: Path, scores: list[float], thresholds: list[float], are_scaled: bool, order: list[float]
) -> None:
    output = RunOutput.single(str(tmp_path))
    parts = {"fine_score": scores} if are_scaled else {}
    write_rows(output, make_output(len(scores), score=scores, threshold=thresholds, **parts))
    assert [row["score"] for row in most_anomalous(output, 4)] == order


def test_the_page_escapes_values_from_data(output: RunOutput, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Rows of several models are ordered by score over threshold; one has none.
    assert [row["peak_x"] for row in most_anomalous(output, 500)] == [*range(99, 0, -1)]
    write_page(output, 20)
    assert len(caplog.records) == 18
    assert all("is not shown: " in each.message and not each.exc_info for each in caplog.records)
    text = (tmp_path / "triage.html").read_text()
    page = Tags(text)
    assert EVIL in page.texts
    # Each picture, and its heatmap, which lies over the second copy of it.
    pictures = [str(attributes["href"]).split(",") for tag, attributes in page.found if tag == "image"]
    assert [kind for kind, _ in pictures] == ["data:image/jpeg;base64", "data:image/png;base64"] * 2
    assert sum("the image can no longer be read" in piece for piece in page.texts) == 18
    sizes, colours = zip(*(_size_and_colour(base64.b64decode(data)) for _, data in pictures[:2]), strict=True)
    assert sizes == ((1024, 512), (1024, 512))
    assert max(colours[0][:3]) - min(colours[0][:3]) < 5
    assert colours[1] == (128, 0, 0, 160)
    assert text.count("<script") == 1
    # One of the two models has two views.
    assert sum(piece.endswith(", coarse 0.25") for piece in page.texts) == 10
    assert "fine 1.71, coarse 0.25" in page.texts
    assert sum(piece.endswith(f", threshold {DECISION}") for piece in page.texts) == 10


def _size_and_colour(data: bytes) -> tuple[tuple[int, int], tuple[int, ...]]:
    with Image.open(io.BytesIO(data)) as image:
        return image.size, image.convert("RGBA").getpixel((99, 99))  # type: ignore[return-value]


_DRAW_PAGES = """
import re, sys
from pathlib import Path
from stpm.scoring.output import RunOutput
from tests.scoring.test_triage import write_page
def peak():
    # ru_maxrss is that of the process that started this one, if it was larger.
    return 1024 * int(re.search("VmHWM:[^0-9]*([0-9]+)", Path("/proc/self/status").read_text())[1])
before = peak()
for folder in sys.argv[1:]:
    write_page(RunOutput.single(folder), 5)
    print(peak() - before)
"""


def test_the_memory_of_a_page_is_that_of_one_large_image(tmp_path: Path) -> None:
    side, folders = 5000, [tmp_path / "JPEG", tmp_path / "PNG"]
    columns = {"category": "nut", "score": 2.0, "threshold": 1.0, "p_value": 0.01}
    for folder in folders:
        folder.mkdir()
        (folder / "x").write_bytes(encode_image(np.full((side, side, 3), 90, np.uint8), folder.name))
        values = columns | {"uri": str(folder / "x")}
        write_rows(RunOutput.single(str(folder)), make_output(5, **{name: [values[name]] * 5 for name in values}))
    program = [sys.executable, "-c", _DRAW_PAGES, *map(str, folders)]
    ran = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True)
    assert [(folder / "triage.html").read_text().count("data:image/jpeg") for folder in folders] == [5, 5]
    # Pillow's images of 4 bytes a pixel: before and after a conversion; of a JPEG, a part of it.
    jpeg, png = map(int, ran.stdout.split())
    assert jpeg < 2 * side**2
    assert png < 8 * side**2


ABSURD = [
    "comma, \"quote\" and 'apostrophe'.png",
    "line\nfeed, carriage\rreturn\tand tab.png",
    "=HYPERLINK(1).png",
    "</script><script>alert(1)</script>.png",
    "ünïcödé 🦆 \u2028 \u202e.png",
    "{{ 7 * 7 }} &amp; %41 \\n.png",
]


def save_marks(tab: Any, folder: Path) -> Marks:
    """Save the marks of a page as a person does, and read them as feedback does."""
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Save marks").click()
    assert download.value.suggested_filename == "marks.jsonl"
    download.value.save_as(folder / "marks.jsonl")
    return read_marks(str(folder / "marks.jsonl"))


def test_marks_are_saved_as_a_table_that_feedback_reads(browser: Any, tmp_path: Path) -> None:
    count, uris = len(ABSURD), [f"{tmp_path}/{name}" for name in ABSURD]
    tab, messages = open_tab(browser, write_alarms(tmp_path, [1] * count, category="a b#c", uri=uris).as_uri())
    assert tab.get_by_role("button", name="Save marks").is_disabled()
    buttons = {label: tab.locator(f".marks [value={label}]") for label in ("good", "defect")}
    for i in range(count):
        buttons["good"].nth(i).click()
    # The other button replaces a mark, and the same one again takes it back.
    buttons["defect"].nth(1).click()
    buttons["good"].nth(2).click()
    assert tab.locator("[aria-pressed=true]").count() == count - 1
    assert tab.locator("output").text_content() == f"{count - 2} good, 1 defect"
    marks = save_marks(tab, tmp_path)
    assert marks.good == {"a b#c": dict.fromkeys((uri for i, uri in enumerate(uris) if i not in (1, 2)), "")}
    assert (marks.other, marks.refused) == ({"defect": 1}, {})
    buttons["good"].nth(1).click()
    assert uris[1] in save_marks(tab, tmp_path).good["a b#c"]
    assert messages == []
    tab.close()


def test_by_keys_a_person_goes_through_large_pictures(output: RunOutput, browser: Any, tmp_path: Path) -> None:
    write_page(output, 50)
    check_page(browser, (tmp_path / "triage.html").as_uri())
    write_page(output, 4)
    tab, messages = open_tab(browser, (tmp_path / "triage.html").as_uri())
    tab.set_viewport_size({"width": 390, "height": 844})
    marks = tab.locator("[aria-pressed=true]")

    def press(*keys: str) -> str:
        for key in keys:
            tab.keyboard.press(key)
        # The image that has the focus, by its row's number.
        return tab.locator("li:has(:focus) dl dd").last.text_content()

    def large() -> list[str]:
        return tab.locator("li.large dl dd:last-of-type").all_text_contents()

    # A key marks no image that is not chosen.
    tab.keyboard.press("d")
    assert marks.count() == 0
    assert press("ArrowRight") == "99, 99"
    assert press("ArrowRight") == "98, 98"
    assert large() == []
    assert press("Enter") == "98, 98"
    assert large() == ["98, 98"]
    picture, heatmap = (tab.locator("li.large svg").nth(i).bounding_box() for i in (0, 1))
    # One above the other on a phone, side by side on a screen.
    assert picture["width"] > 300
    assert heatmap["y"] >= picture["y"] + picture["height"]
    tab.set_viewport_size({"width": 1400, "height": 900})
    picture, heatmap = (tab.locator("li.large svg").nth(i).bounding_box() for i in (0, 1))
    assert picture["width"] > 600
    assert (heatmap["y"], heatmap["x"] >= picture["x"] + picture["width"]) == (picture["y"], True)
    assert press("d", "ArrowRight", "g") == "97, 97"
    assert large() == ["97, 97"]
    assert [marks.nth(i).get_attribute("value") for i in (0, 1)] == ["defect", "good"]
    assert tab.locator("output").text_content() == "1 good, 1 defect"
    assert tab.locator("li.large .heatmap").is_visible()
    press("h")
    assert not tab.locator("li.large .heatmap").is_visible()
    tab.get_by_role("button", name="next").click()
    assert press("ArrowRight", "ArrowRight") == "96, 96"
    assert press("Escape", "ArrowLeft") == "97, 97"
    assert large() == []
    tab.locator(".open").first.click()
    assert large() == ["99, 99"]
    tab.locator(".open").first.click()
    assert large() == []
    assert messages == []
    tab.close()


def test_boxes_lie_over_the_regions_of_the_part_that_is_shown(browser: Any, tmp_path: Path) -> None:
    """Of an image of 400 × 200, the model sees the square in the middle. The key b takes the boxes away."""
    pixels = np.full((200, 400, 3), 60, np.uint8)
    pixels[50:90, 150:210] = 255
    (tmp_path / "x.png").write_bytes(encode_image(pixels))
    region = {"left": 150, "top": 50, "right": 210, "bottom": 90, "area": 2400, "share": 0.06, "score": 3.0}
    values = {"uri": str(tmp_path / "x.png"), "category": "nut", "score": 3.0, "threshold": 1.0, "p_value": 0.1}
    values |= {"is_anomalous": True, "width": 400, "height": 200, "region_count": 21, "regions": [region]}
    output = RunOutput.single(str(tmp_path))
    write_rows(output, make_output(1, **{name: [value] for name, value in values.items()}))
    cropped = dataclasses.replace(NUT, preprocessing=make_preprocessing(64, resize="crop"))
    write_triage(output, 1, {"nut": cropped})
    tab, messages = open_tab(browser, (tmp_path / "triage.html").as_uri())
    assert "21, the largest 6 % of what is inspected" in tab.locator("dd").all_text_contents()
    box, picture = (tab.locator(name).first.bounding_box() for name in (".regions rect", ".pair svg"))
    shown = [box["x"] - picture["x"], box["y"] - picture["y"], box["width"], box["height"]]
    expected = [picture["width"] * part for part in (50 / 200, 50 / 200, 60 / 200, 40 / 200)]
    # The line is two pixels wide.
    assert shown == pytest.approx(expected, abs=2.5)
    tab.keyboard.press("b")
    assert not tab.locator(".regions rect").first.is_visible()
    inside = np.asarray(Image.open(io.BytesIO(tab.screenshot(clip=box))).convert("L"))
    assert np.mean(inside[3:-3, 3:-3] > 240) > 0.99
    assert messages == []
    tab.close()


def write_alarms(folder: Path, sizes: list[int], category: str = "nut", **columns: Any) -> Path:
    """Write the page of kinds of alarms of these sizes; the most anomalous one is of the first."""
    vectors, _ = blobs(sizes)
    count = len(vectors)
    same = {"category": category, "model_id": "nut-1", "threshold": 1.0, "p_value": 0.1, "is_anomalous": True}
    values = {name: [value] * count for name, value in same.items()}
    values |= {"uri": [f"{folder}/{i}.png" for i in range(count)], "score": [9.0 - i / count for i in range(count)]}
    values |= {"peak_x": range(count), "peak_features": list(vectors)} | columns
    output = RunOutput.single(str(folder))
    write_rows(output, make_output(count, **values))
    write_page(output, max(count, 1))
    return folder / "triage.html"


def test_one_key_marks_a_kind_and_the_alarms_of_it_that_are_behind_a_click(browser: Any, tmp_path: Path) -> None:
    tab, messages = open_tab(browser, write_alarms(tmp_path, [6, 1, 40]).as_uri())
    tab.set_viewport_size({"width": 390, "height": 844})
    headings = tab.locator("h2")
    assert headings.all_text_contents() == ["Kind 1: 40 alarms of nut", "Kind 2: 6 alarms of nut", "Single: 1 images"]
    # Four of each kind, and the one that looks like no other.
    assert tab.locator("li:visible").count() == 9
    first, more = tab.locator("section").first, tab.locator("summary")
    assert more.all_text_contents() == ["36 more", "2 more"]

    def marked() -> tuple[int, str]:
        return first.locator("[aria-pressed=true]").count(), tab.locator("output").text_content()

    def press(*keys: str) -> tuple[int, str]:
        for key in keys:
            tab.keyboard.press(key)
        return marked()

    assert press("ArrowRight", "Shift+D") == (40, "0 good, 40 defect")
    # One of them is another, in the middle of the large pictures; caps lock is no shift.
    assert press("Enter", "ArrowRight", "G") == (40, "1 good, 39 defect")
    assert press("Escape", "Shift+D", "Shift+D") == (0, "0 good, 0 defect")
    # The fifth arrow leaves the kind, unless all of it is shown.
    assert press("ArrowRight", "ArrowRight", "ArrowRight", "g") == (0, "1 good, 0 defect")
    assert press("ArrowLeft", "m", "d") == (1, "1 good, 1 defect")
    assert tab.locator("li:visible").count() == 45
    assert tab.locator("li:has(:focus) dl dd").last.text_content().startswith("11")
    tab.get_by_role("button", name="all good").nth(1).click()
    assert marked() == (1, "6 good, 1 defect")
    # In no kind, an image is alone.
    tab.locator(".open").last.focus()
    assert press("Shift+G") == (1, "7 good, 1 defect")
    marks = save_marks(tab, tmp_path)
    assert marks.good == {"nut": {f"{tmp_path}/{i}.png": "" for i in range(7)}}
    assert marks.other == {"defect": 1}
    assert messages == []
    tab.close()


@pytest.mark.parametrize(("sizes", "shown"), [([], 0), ([1], 1), ([2600, 2399, 1], 9)])
def test_any_page_shows_a_few_of_each_kind(browser: Any, tmp_path: Path, sizes: list[int], shown: int) -> None:
    page = write_alarms(tmp_path, sizes).as_uri()
    check_page(browser, page)
    tab, _ = open_tab(browser, page)
    assert f"The {sum(sizes)} most anomalous images" in tab.locator("body").inner_text()
    assert (tab.locator("li").count(), tab.locator("li:visible").count()) == (sum(sizes), shown)
    tab.close()
