"""Two scored runs compared: the pairs against a plain reference, and the job up to its page in a browser."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from stpm.errors import ConfigError, DataError, ModelError
from stpm.evaluation import gallery
from stpm.evaluation.compare import Comparison, Run, compare, read_run
from stpm.evaluation.options import CompareOptions
from stpm.jobs.compare import run_compare
from stpm.models.store import ModelStore
from stpm.options import Names
from stpm.scoring.output import RunOutput
from tests.browser import check_page, open_tab
from tests.conftest import TINY
from tests.datasets import make_output, with_column, write_rows
from tests.evaluation.runs import finish_run, scored_run
from tests.models.test_store import save

EVIL = "<img src=x onerror=alert(1)>\"'"
KINDS = {"defects found": "hole", "false alarms": "good", "alarms without a label": ""}
# By category and number of the image: its label, and its score or None for an error. The threshold is 2.
Images = dict[tuple[str, int], tuple[str, float | None]]
IMAGES = st.dictionaries(
    st.tuples(st.sampled_from("ab"), st.integers(0, 5)),
    st.tuples(st.sampled_from(["", "good", "hole"]), st.none() | st.sampled_from([1.0, 2.0, 3.0, 4.0])),
)


def as_run(name: str, images: Images) -> Run:
    columns: dict[str, Any] = {"category": [], "uri": [], "label": [], "score": [], "threshold": [], "is_anomalous": []}
    for (category, number), (label, score) in images.items():
        row = (category, f"s3://b/{number}.png", label, score, None if score is None else 2.0, score and score > 2)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    rows = make_output(len(images), **columns).select(list(columns))
    return Run(name, rows, {})


def check(found: Comparison, a: Images, b: Images, common: list[tuple[str, int]]) -> None:
    """Check the counts and lists of a category, or of all, by going through its images one by one."""
    cells = {row[""]: row for row in found.rows}
    for what, wanted in KINDS.items():
        keys = [key for key in common if (b[key][0] or a[key][0]) == wanted]
        assert (what in cells) == bool(keys)
        if not keys:
            continue
        alarms = [{key for key in keys if images[key][1] > 2} for images in (a, b)]  # type: ignore[operator]
        for name, flagged in zip("AB", alarms, strict=True):
            assert cells[what][name].startswith(f"{len(flagged)} of {len(keys)} (")
        new, gone = alarms[1] - alarms[0], alarms[0] - alarms[1]
        assert cells[what]["B − A"] == f"{len(new) - len(gone):+} ({len(new)} in B alone, {len(gone)} in A alone)"
        if found.category != "all":
            for name, alone, images in (("B", new, b), ("A", gone, a)):
                ordered = sorted(alone, key=lambda key: (-images[key][1], key))  # type: ignore[operator]
                assert found.changes.get(f"{what} in {name} alone", []) == [f"s3://b/{key[1]}.png" for key in ordered]
    counted = {key for key in common if b[key][0] or a[key][0]}
    labels = [(b[key][0] or a[key][0]) == "hole" for key in counted]
    assert ("image AUROC" in cells) == (found.category != "all" and len(set(labels)) == 2)
    if "image AUROC" in cells:
        areas = [roc_auc_score(labels, [images[key][1] for key in counted]) for images in (a, b)]
        for name, area in zip("AB", areas, strict=True):
            assert cells["image AUROC"][name].startswith(f"{area:.4f} (")
        assert found.headline.endswith(f"; AUROC {cells['image AUROC']['B − A']}")
        assert float(cells["image AUROC"]["B − A"].split()[0]) == pytest.approx(areas[1] - areas[0], abs=1e-4)


@given(IMAGES, IMAGES)
def test_images_are_paired_by_category_and_uri(a: Images, b: Images) -> None:
    common = [key for key in sorted(a.keys() & b.keys()) if None not in (a[key][1], b[key][1])]
    runs = as_run("first", a), as_run("second", b)
    if not common:
        with pytest.raises(DataError, match=r"^first and second have scored no image in common \(.*\); score the same"):
            compare(*runs)
        return
    found, remarks = compare(*runs)
    names = sorted({category for category, _ in common})
    assert [each.category for each in found] == names + (["all"] if len(names) > 1 else [])
    for each in found:
        check(each, a, b, [key for key in common if each.category in ("all", key[0])])
    broken = len(a.keys() & b.keys()) - len(common)
    left_out = {"in A alone": len(a.keys() - b.keys()), "in B alone": len(b.keys() - a.keys())}
    other = sum("" not in (a[key][0], b[key][0]) and a[key][0] != b[key][0] for key in a.keys() & b.keys())
    expected = {**left_out, "in both, with an error in one": broken}
    expected |= {"labelled otherwise in A than in B, whose labels count": other}
    said = Counter({line.split(" are ")[1].split(", such as")[0]: int(line.split()[0]) for line in remarks})
    assert said == {where: count for where, count in expected.items() if count}


def test_a_sentence_says_what_b_does_otherwise() -> None:
    a: Images = {("a", i): ("hole" if i < 4 else "good" if i < 8 else "", 1.0) for i in range(9)}
    b: Images = a | {("a", i): (a["a", i][0], 3.0) for i in (0, 1, 4)}
    (found,), remarks = compare(as_run("a", a), as_run("b", b))
    assert found.headline.startswith("B finds 2 more of 4 defects and raises a false alarm for 1 more of 4 good images")
    assert " and raises an alarm for as many (0) of 1 images without a label; AUROC +0.1250 (" in found.headline
    # The scores of A are all alike.
    assert found.rows[-1] == {"category": "a", "": "rank correlation", "A": "", "B": "", "B − A": "nan"}
    assert remarks == []
    (back,), _ = compare(as_run("b", b), as_run("a", a))
    assert back.headline.startswith("B finds 2 fewer of 4 defects and raises a false alarm for 1 fewer of 4 good")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write two finished runs in folders whose names are markup: B lacks an image, and decides the others in turn."""
    root = tmp_path_factory.mktemp("compare") / EVIL
    output = scored_run(root).output
    box = {"left": 1, "top": 2, "right": 30, "bottom": 40, "area": 900, "share": 0.5, "score": 3.0}
    rows = with_column(pq.read_table(output.files()[0]), "regions", [[box]] * 12)
    write_rows(output, rows)
    store = ModelStore(str(root / "models"))
    model_id = save(store, TINY).model_id
    finish_run(output, model_id, store.uri, 12)
    other = RunOutput.named(str(root / "other"), "seed-0")
    shutil.copytree(output.folder, other.folder)
    finish_run(other, model_id, store.uri, 11)
    write_rows(other, with_column(rows, "is_anomalous", [i % 2 == 0 for i in range(len(rows))]).slice(1))
    return [output.folder, other.folder]


def test_two_runs_on_a_page(
    folders: list[str], tmp_path: Path, browser: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "compare.html"
    assert run_compare(CompareOptions(run=folders, page=str(page))) == 0  # type: ignore[arg-type]
    (headline,) = (line.removeprefix("nut: ") for line in caplog.messages if line.startswith("nut: "))
    (left_out,) = (line for line in caplog.messages if line.startswith("1 images are in A alone, such as "))
    check_page(browser, page.as_uri())
    tab, _ = open_tab(browser, page.as_uri())
    assert tab.locator(".headline").inner_text() == f"{headline}."
    assert left_out in tab.locator("body").inner_text()
    runs = [read_run(folder, "") for folder in folders]
    (found,), _ = compare(*runs)
    assert tab.locator("td").all_inner_texts() == [text for row in found.rows for text in list(row.values())[1:]]
    assert len(found.changes) > 1
    figures = tab.locator("figure")
    assert figures.count() == sum(map(len, found.changes.values()))
    # The image, and under the heatmap of each.
    assert figures.first.locator("svg:visible").count() == 3
    first = next(iter(found.changes.values()))[0]
    scores = [run.rows.filter(pc.field("uri") == first)["score"][0].as_py() for run in runs]
    # The regions of A, and dashed those of B; the key b takes them away.
    boxes = figures.first.locator(".a .regions rect:visible")
    dashes = boxes.evaluate_all("boxes => boxes.map(each => getComputedStyle(each).strokeDasharray)")
    assert dashes == ["none", "5px, 3px"]
    tab.keyboard.press("b")
    assert boxes.count() == 0
    for name, score in zip("AB", scores, strict=True):
        assert f"{name}: score {score:.3g}, threshold 1, " in figures.first.inner_text()
    tab.close()
    # Of a long list, the page shows the beginning.
    monkeypatch.setattr(gallery, "_MAX_TILES", 1)
    run_compare(CompareOptions(run=folders, page=str(page)))  # type: ignore[arg-type]
    title, uris = next((title, uris) for title, uris in found.changes.items() if len(uris) > 1)
    assert f"<h3>{title}: 1 of {len(uris)} shown</h3>" in page.read_text()


def test_what_cannot_be_compared_is_refused(folders: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--run names 1 runs, and --models 0 stores; give two runs"):
        CompareOptions(run=Names("a"))
    with pytest.raises(ConfigError, match=r"^A and B are both .*run; give two runs"):
        run_compare(CompareOptions(run=Names([folders[0], f"{folders[0]}/"])))
    with pytest.raises(ModelError, match=r"/gone: no model .*; if its store has moved, name the new place by --models"):
        run_compare(CompareOptions(run=Names(folders), models=Names([f"{tmp_path}/gone"])))
    store = folders[0].replace("/run", "/models")
    page = str(tmp_path / "moved.html")
    assert run_compare(CompareOptions(run=Names(folders), models=Names([store]), page=page)) == 0
    shutil.copytree(folders[0], tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "runs" / "seed-0", tmp_path / "run" / "runs" / "seed-1")
    with pytest.raises(DataError, match="run: several runs have scored nut"):
        read_run(str(tmp_path / "run"), "")
    (tmp_path / "run" / "runs" / "seed-0" / "_SUCCESS").unlink()
    with pytest.raises(DataError, match="this run is not finished"):
        read_run(str(tmp_path / "run"), "")
