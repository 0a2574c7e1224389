"""The examples in docstrings, in docs/python.md, README.md and docs/from-a-service.md are correct."""

import dataclasses
import doctest
import json
import logging
import re
import runpy
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import stpm
from stpm.data import demo
from stpm.data.masks import read_mask
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.sources import image_rows
from tests.conftest import REPOSITORY


@pytest.fixture(autouse=True)
def no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the handlers of jobs that other tests ran in this process: their lines would count as output."""
    monkeypatch.setattr(logging.getLogger("stpm"), "handlers", [])


FILES = [path for path in sorted((REPOSITORY / "stpm").rglob("*.py")) if ">>> " in path.read_text()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_examples_in_docstrings_are_correct(path: Path) -> None:
    module = import_module(".".join(path.relative_to(REPOSITORY).with_suffix("").parts))
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    demo.make(str(folder))
    return folder


@pytest.fixture
def short_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, and let the default recipe take seconds: one epoch, and a small memory."""
    short = dataclasses.replace(stpm.PRESETS["default"], epochs=1, warmup_epochs=0, min_steps=0, memory=200)
    monkeypatch.setitem(stpm.PRESETS, "default", short)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("short_fits")
def test_examples_in_the_python_page_are_correct(demo_data: Path) -> None:
    page = REPOSITORY / "docs" / "python.md"
    Path("data").symlink_to(demo_data)
    # The end of a block would count as output.
    text = re.sub(r"^```.*$", "", page.read_text(), flags=re.MULTILINE)
    assert text.count("\n>>> ") == page.read_text().count(">>> ")
    examples = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    failed, attempted = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples)
    assert attempted > 0
    assert failed == 0


@pytest.mark.usefixtures("short_fits")
def test_the_lines_in_the_readme_make_its_picture(demo_data: Path) -> None:
    Path("runs/benchmark").mkdir(parents=True)
    Path("runs/benchmark/demo-data").symlink_to(demo_data)
    (lines,) = re.findall(r"^```python\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    Path("lines.py").write_text(lines)
    runpy.run_path("lines.py")
    # A short fit makes a picture with other colours.
    with Image.open("found.jpg") as made, Image.open(REPOSITORY / "docs" / "found.jpg") as stored:
        assert made.size == stored.size
    assert stpm.load("models", "gravel").record.fit.train_count == 128


@pytest.mark.usefixtures("short_fits")
def test_the_lines_for_a_manifest_fit_its_normal_images_and_make_a_table_with_masks(demo_data: Path) -> None:
    def line(image: Path, mask: Path | None = None) -> str:
        values: dict[str, object] = {"source-ref": str(image), "anomaly-label": int(image.parent.name != "good")}
        return json.dumps(values | ({"anomaly-mask-ref": str(mask)} if mask else {}))

    gravel = demo_data / "gravel"
    images = [gravel / "test" / name for name in ("hole/000.png", "stain/001.png", "good/000.png")]
    with Image.open(gravel / "ground_truth/hole/000_mask.png") as stored:
        hole = np.asarray(stored) > 0
    coloured = np.where(hole[..., None], (44, 160, 44), 255).astype(np.uint8)
    Image.fromarray(coloured).save("coloured.png")
    good = sorted((gravel / "train/good").iterdir())[:15]
    Path("train.manifest").write_text("\n".join(map(line, [*good, images[0]])))
    Path("test.manifest").write_text("\n".join([line(images[0], Path("coloured.png")), *map(line, images[1:])]))
    (lines,) = re.findall(
        r"^```python\n(.*?)^```", (REPOSITORY / "docs/from-a-service.md").read_text(), re.MULTILINE | re.DOTALL
    )
    Path("lines.py").write_text(lines)
    mask = runpy.run_path("lines.py")["mask"]
    assert mask.shape == hole.shape
    assert mask[hole].mean() > mask[~hole].mean()
    assert stpm.load("models", "gravel").record.fit.train_count == 12
    (table,) = image_rows(["test.jsonl"], CategoryRule(), [str(demo_data), "."])
    rows = table.to_pylist()
    assert [(row["uri"], row["category"], row["label"], row["error_kind"]) for row in rows] == [
        (str(image), "gravel", label, "") for image, label in zip(images, ("defect", "defect", "good"), strict=True)
    ]
    assert [bool(row["mask"]) for row in rows] == [True, False, False]
    assert np.array_equal(read_mask(rows[0]["uri"], "defect", rows[0]["mask"], *hole.shape[::-1]), hole)
