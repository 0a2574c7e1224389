"""Thresholds with what they promise: the numbers, the text of the job, and the page in a browser."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from stpm.errors import DataError
from stpm.evaluation.thresholds import CategoryThresholds
from stpm.jobs.models import run_models
from stpm.method.calibration import log_normal_limit
from stpm.models.options import Costs, ModelsOptions
from stpm.models.store import ModelStore
from stpm.options import Names
from stpm.scoring.output import RunOutput
from stpm.scoring.run_state import RunState, ScoringConfig
from tests.browser import EVIL, Tags, check_page, check_tags
from tests.conftest import MODELS
from tests.datasets import make_output, write_rows
from tests.evaluation.runs import finish_run, result
from tests.models.test_store import save

MODEL = result("nut", 0, None, None).model


def test_the_numbers_are_those_that_anyone_can_count(rng: np.random.Generator) -> None:
    scores = np.sort(rng.normal(0, 1, 60).astype(np.float32))
    defects = rng.normal(2, 1, 40).astype(np.float32)
    table = CategoryThresholds(MODEL, scores, 0.5, defects, costs=Costs(1, 50, 0.01))
    thresholds = [np.float32(row["threshold"]) for row in table.rows]
    assert thresholds == sorted(thresholds, reverse=True)
    guessed = {row["if log-normal"]: np.float32(row["threshold"]) for row in table.rows if row["if log-normal"]}
    assert guessed == {f"{1000 * rate:g}": np.float32(log_normal_limit(scores, rate)) for rate in (0.01, 0.001)}
    assert {*thresholds} <= {*scores, np.float32(0.5), *guessed.values()}
    assert [row["threshold"] for row in table.rows if "in force" in row[""]] == ["0.5"]
    assert (max({*thresholds} - {*guessed.values()}), thresholds[-1]) == (scores[-1], scores[-31])
    assert 10 <= len(thresholds) <= 15
    costs = []
    for threshold, row in zip(thresholds, table.rows, strict=True):
        rate, found = (1 + (scores > threshold).sum()) / 61, (defects > threshold).sum()
        low, high = stats.binomtest(int(found), 40).proportion_ci(method="wilson")
        bound = stats.beta.ppf(0.9, rate * 61, 61 - rate * 61)
        assert row["false-alarm rate"] == f"{rate:.4f}"
        assert row["expected of 1,000 good"] == f"{1000 * rate:.1f}"
        assert row["in 9 of 10 cases at most"] == f"{1000 * bound:.1f}"
        assert (row["found"], row["recall"]) == (f"{found} of 40", f"{found / 40:.3f} ({low:.3f} to {high:.3f})")
        costs.append(1000 * (0.99 * rate + 0.01 * 50 * (1 - found / 40)))
        assert row["cost of 1,000 images"] == f"{costs[-1]:.4g}"
    assert [i for i, row in enumerate(table.rows) if "least cost" in row[""]] == [int(np.argmin(costs))]
    assert 0 < int(np.argmin(costs)) < len(costs) - 1


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_few_images_have_a_few_thresholds(count: int) -> None:
    scores = np.arange(count, dtype=np.float32)
    # In force is one below all of them.
    *rows, last = CategoryThresholds(MODEL, scores, -1.0).rows
    assert [row["threshold"] for row in rows] == [f"{i:.1f}" for i in range(count - 1, count - count // 2 - 2, -1)]
    assert list(last.values()) == ["in force", "-1.0", "1.0000", "1000.0", "1000.0"]


class Store:
    """A store with a model of `nut`, and a run of labelled images."""

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, ModelStore(str(root / "models"))
        self.record = save(self.store, MODELS["memory"])

    def score(self, labels: dict[str, list[float]], model_id: str = "") -> None:
        output = RunOutput.single(str(self.root / "run"))
        threshold = 0.45
        scores = [score for values in labels.values() for score in values]
        names = [label for label, values in labels.items() for _ in values]
        same = {"category": ["nut"] * len(names), "threshold": [threshold] * len(names)}
        alarms = [score > threshold for score in scores]
        write_rows(output, make_output(len(names), label=names, score=scores, is_anomalous=alarms, **same))
        finish_run(output, model_id or self.record.model_id, self.store.uri)

    def show(self, **options: Any) -> int:
        categories = Names([] if "threshold" in options else ["nut"])
        return run_models(ModelsOptions(self.store.uri, categories, **options))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_recall_needs_labels_of_more_than_alarms(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match="no scores here"):
        store.show(labelled=str(store.root / "run"))
    store.score({"good": [0.1, 0.5], "dent": [0.3, 0.9], "": [9.0] * 7})
    labelled = {"labelled": str(store.root / "run")}
    assert store.show(**labelled, cost_of_false_alarm=1.0, cost_of_miss=50.0, defect_rate=0.1) == 0
    lines = [" ".join(line.split()) for line in caplog.messages if "1 of 2 " in line]
    # Of the calibration scores 0.2, 0.4 and 0.7, the largest is in force.
    costs = [f"{900 * rate + 100 * 50 / 2:g}" for rate in (0.25, 0.5)]
    assert lines == [
        f"in force least cost 0.7 0.2500 250.0 535.8 1 of 2 0.500 (0.095 to 0.905) {costs[0]}",
        f"0.4 0.5000 500.0 804.2 1 of 2 0.500 (0.095 to 0.905) {costs[1]}",
    ]
    assert "labels of alarms alone flatter" in caplog.text
    assert "A false alarm costs 1, a missed defect 50, and 0.1 of the images have a defect." in caplog.messages
    caplog.clear()
    # Each of the labelled is an alarm, as those that a person marked on the page of alarms.
    store.score({"good": [0.5], "dent": [0.9], "": [0.1] * 7})
    assert store.show(**labelled) == 0
    assert "The recall is not known: each of the 2 labelled images was an alarm" in caplog.text
    assert "of 2 " not in caplog.text
    store.score({"good": [0.5, 0.1]})
    assert store.show(**labelled) == 3
    assert "no image of nut has the label of a defect" in caplog.text
    state = RunState(f"{store.root}/run")
    state.start(ScoringConfig((), 0.25))
    state.bind_models({"nut": store.record.model_id}, store.store.uri)
    assert store.show(**labelled) == 3
    assert "no record of a finished run; run the score job first" in caplog.text


def test_recall_is_that_of_a_model_with_the_same_scores(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    labelled = {"labelled": str(store.root / "run")}
    store.score({"good": [0.1], "dent": [0.9]})
    assert store.show(threshold=Names(["nut=0.5"]), by="ann", **labelled) == 0
    assert "1 of 1" in caplog.text
    assert f"The threshold in force is {store.store.record('nut').decision}." in caplog.messages
    other = save(store.store, dataclasses.replace(MODELS["memory"], top_fraction=0.5))
    assert store.show(**labelled) == 3
    assert f"no run there has scored nut with a model of this store that scores as {other.model_id} does" in caplog.text
    store.score({"good": [0.1], "dent": [0.9]}, "nut-removed")
    assert store.show(**labelled) == 3


def test_the_page_is_readable_and_escapes_what_a_person_wrote(store: Store, browser: Any, tmp_path: Path) -> None:
    page, labels = tmp_path / "thresholds.html", {"good": [0.1, 0.3], "dent": [0.3, 0.6, 0.9]}
    store.score(labels)
    decision = {"threshold": Names(["nut=0.5"]), "by": "ann", "because": EVIL}
    assert store.show(**decision, page=str(page), labelled=f"{tmp_path}/run") == 0
    text = page.read_text()
    assert any("decided by ann" in piece and EVIL in piece for piece in Tags(text).texts)
    assert [tag for tag, _ in Tags(text).found].count("svg") == 1
    check_tags(Tags(text), scripts=0)
    # Below all scores is every image.
    assert "100" in Tags(text).texts
    # A dot at each threshold, and one in the legend.
    dots = re.search(r'<g id="line2d_\d+">(?:(?!</g>).)*?(?:<use[^>]*>\s*){3}', text, re.DOTALL)
    assert dots
    check_page(browser, page.as_uri())
