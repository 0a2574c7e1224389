"""Which good images a fit names, what its page shows, and what is left out by a list."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stpm import storage
from stpm.data import mvtec
from stpm.errors import ConfigError, DataError
from stpm.fitting.fit_categories import read_categories
from stpm.fitting.options import FitOptions
from stpm.fitting.outliers import find_outliers
from stpm.fitting.task import FitTask, FitWarning
from stpm.method.calibration import threshold
from stpm.method.recipe import Recipe
from stpm.models.record import ModelRecord
from tests.browser import Tags, check_page, open_tab
from tests.conftest import MODELS
from tests.datasets import encode_image, make_category
from tests.fitting.helpers import PADDED, FeaturesOf, unpadded
from tests.fitting.test_fit_category import fit, task_in

BAD = (3, 8)


def with_defects(root: Path, recipe: Recipe, count: int = 24) -> FitTask:
    """Make a task whose images 3 and 8 have a like defect, and text in their names."""
    task = task_in(root, recipe, train=count)
    for number in BAD:
        pixels = np.random.default_rng(number).integers(90, 130, (48, 40, 3), dtype=np.uint8)
        pixels[8:30, 4:24] = (250, 20, 20)
        storage.publish(task.train[number][0], encode_image(pixels))
    uri = task.train[BAD[0]][0]
    storage.publish(uri.replace("003.png", "<b>&.png"), storage.read(uri))
    storage.remove(uri)
    return dataclasses.replace(task, train=mvtec.read_category(f"{root}/data", "nut").train)


def page_of(task: FitTask, record: ModelRecord) -> str:
    return f"{task.store}/nut/{record.model_id}/fit.html"


def names_of(warnings: list[FitWarning]) -> list[list[str]]:
    return [re.findall(r"([^/]*\.png) \(", each) for each in warnings if "unlike all others" in each]


@pytest.mark.parametrize("kind", ["student", "memory", "two views"])
def test_alike_defects_are_named_shown_and_left_out_by_the_saved_list(tmp_path: Path, kind: str, browser: Any) -> None:
    task, reported = with_defects(tmp_path, MODELS[kind]), []
    record = fit(task, reported=reported)
    warnings = [each for each in reported if isinstance(each, FitWarning)]
    assert [sorted(names[:2]) for names in names_of(warnings)] == [["008.png", "<b>&.png"]]
    page = page_of(task, record)
    assert f"good images, those unlike all others first: {page}" in reported
    # The page is a file of the model: a copy of the model has it, and damage is found.
    assert "fit.html" in record.files
    tags = Tags(storage.read(page).decode())
    shown = [values["alt"] for name, values in tags.found if name == "img"]
    assert len(shown) == 24
    assert {uri.rpartition("/")[2] for uri in shown[:2] if uri} == {"008.png", "<b>&.png"}
    check_page(browser, f"file://{page}")
    tab, messages = open_tab(browser, f"file://{page}")
    for box in tab.locator("ol input").all()[:2]:
        box.check()
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Save list").click()
    download.value.save_as(tmp_path / "exclude.txt")
    assert messages == []
    tab.close()
    (category,), _ = read_categories(f"{tmp_path}/data", (), str(tmp_path / "exclude.txt"))
    assert {*task.train} - {*category.train} == {image for image in task.train if image[0] in shown[:2]}
    cleaned, reported = dataclasses.replace(task, train=category.train), []
    assert cleaned.data_fingerprint != task.data_fingerprint
    fit(cleaned, reported=reported)
    assert not any("008.png" in each or "<b>&.png" in each for each in reported if isinstance(each, FitWarning))


@pytest.mark.parametrize("ram", [0, 2**30])
def test_scores_ignore_padding_and_thresholds_are_of_others(
    rng: np.random.Generator, features_of: FeaturesOf, ram: int
) -> None:
    pixels = rng.integers(90, 130, (12, 64, 64, 3), dtype=np.uint8)
    pixels[5, 24:40, 20:44] = (255, 0, 0)
    images = dataclasses.replace(unpadded(pixels), content=PADDED[np.arange(12) % 9])
    images.statistics[:, :2] = 64
    calibrating, scores = np.array([1, 5, 9]), np.array([2.0, 9.0, 4.0], np.float32)
    warning, page = find_outliers(features_of(MODELS["memory"], images, ram), calibrating, scores, 0)
    assert re.search(r"unlike all others: /good/5.png .* would be about 4, not 9. If one has a defect", warning)
    order = [int(Path(str(values["alt"])).stem) for name, values in Tags(page.decode()).found if name == "img"]
    assert sorted(order) == list(range(12))
    shown = re.findall(r"threshold without (\S+)</p>", page.decode())
    for count, text in enumerate(shown, 1):
        rest = [score for i, score in zip(calibrating, scores, strict=True) if i not in order[:count]]
        assert text == (f"{threshold(np.sort(np.array(rest, np.float32)), 0.01):.3g}" if rest else "none")
    # Of ten and more scores, one far above the others names an image that its distance does not.
    scores = np.where(np.arange(12) == 2, 40, np.linspace(1, 2, 12)).astype(np.float32)
    warning, page = find_outliers(features_of(MODELS["memory"], images, ram), np.arange(12), scores, 0)
    assert {*re.findall(r"/good/(\d+).png", warning)} == {"2", "5"}
    assert "would be about 2, not 40" in warning
    # Where it alone calibrates, nothing is known without it.
    assert "threshold" not in find_outliers(features_of(MODELS["memory"], images, ram), np.array([5]), scores[:1], 0)[0]


@pytest.mark.parametrize(("kind", "count"), [("student", 2), ("memory", 3), ("two views", 3)])
def test_the_smallest_number_of_images_has_a_page_and_no_warning(tmp_path: Path, kind: str, count: int) -> None:
    task, reported = task_in(tmp_path, MODELS[kind], train=count), []
    record = fit(task, reported=reported)
    assert not names_of([each for each in reported if isinstance(each, FitWarning)])
    assert storage.read(page_of(task, record)).count(b"<img") == count


@pytest.mark.parametrize(
    ("lines", "left", "error"),
    [
        (["\ufeff{root}/nut/train/good/002.png", "", "  nut/train/good/004.png "], {"nut": 6, "bolt": 10}, ""),
        (["009.png"], {}, "is no good image of the categories"),
        (["001.png"], {}, "001.png is /.*/bolt/.*; /.*/nut/.*/001.png; give"),
        (["good/007.png"], {}, "good/007.png is /.*/nut/train/good/007.png; give"),
        (["a/000.png"], {}, "a/000.png is /.*/b/a/000.png; give"),
        (["nut/test/good/001.png"], {}, "is no good image of the categories"),
        (["nut/train/good/00*.png"], {}, "is no good image of the categories"),
        (None, {}, "no such text file"),
    ],
)
def test_a_list_leaves_out_what_it_names(
    tmp_path: Path, lines: list[str] | None, left: dict[str, int], error: str
) -> None:
    root, file = f"{tmp_path}/data", tmp_path / "exclude.txt"
    for name in ("bolt", "nut"):
        make_category(root, name, good=2, defects=0)
    for lot in ("a", "b/a"):
        storage.publish(f"{root}/bolt/train/good/{lot}/000.png", storage.read(f"{root}/bolt/train/good/000.png"))
    if lines is not None:
        file.write_text("\n".join(lines).format(root=root))
    if error:
        with pytest.raises(DataError, match=error):
            read_categories(root, (), str(file))
        return
    categories, _ = read_categories(root, (), str(file))
    assert {category.name: len(category.train) for category in categories} == left
    assert all(len(category.test) == 2 for category in categories)


def test_a_list_is_refused_where_nothing_is_fitted() -> None:
    with pytest.raises(ConfigError, match="--exclude is given with --add-good"):
        FitOptions(models="m", add_good="marks.jsonl", exclude="list.txt")
