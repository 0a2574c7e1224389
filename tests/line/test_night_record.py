"""Records of nights from rows, with the verdicts of `verdict.judge` itself."""

import datetime
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stpm import storage
from stpm.data.image_statistics import COMPARED
from stpm.jobs.models import run_models
from stpm.line import night_record
from stpm.line.night import Night
from stpm.line.night_folder import NightFolder
from stpm.line.night_record import make_record, read_rows
from stpm.line.options import MonitoringOptions, NightlyOptions
from stpm.line.score_nights import NightlyJob
from stpm.models.options import ModelsOptions
from stpm.models.store import ModelStore
from stpm.options import ClusterOptions, Names
from stpm.scoring.inputs.manifest import write_manifest
from stpm.scoring.options import OutputOptions, ScoreOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.run_state import RunState, ScoringConfig
from tests.conftest import TINY
from tests.datasets import write_rows
from tests.line.nightly_runs import DATE, output_rows
from tests.models import test_store


class Nights:
    """Nights of one category, whose images look as those of its model."""

    def __init__(self, root: Path) -> None:
        self.root, self.rng = root, np.random.default_rng(0)
        self.store = ModelStore(str(root / "models"))
        options = NightlyOptions(models=self.store.uri, images=Names(["/no/dump/{date}"]), out=str(root / "nights"))
        scoring = ScoreOptions(false_alarm_rate=0.25)
        self.job = NightlyJob(options, MonitoringOptions(), OutputOptions(), scoring, ClusterOptions())
        record = test_store.save(self.store, TINY)
        self.model_id = record.model_id
        self.nights: list[Night] = []

    def add(self, count: int, category: str = "nut", model_id: str = "", problem: str = "", **changed: float) -> Night:
        """Write and judge the next night; `changed` is added to the values of some columns."""
        date = DATE + datetime.timedelta(days=len(self.nights))
        folder = NightFolder.of(str(self.root / "nights"), date)
        uris = [{"image_id": i, "uri": f"/no/dump/{date}/{i}.png", "category": category} for i in range(count)]
        rows = output_rows(uris, self.model_id if model_id == "" else "").to_pylist()
        for row in rows:
            # As in tests/models/test_store.py: column i has the values i to i + 7.
            row |= {name: float(i + self.rng.integers(8)) for i, name in enumerate(COMPARED)}
            row |= {"width": int(row["width"]), "height": int(row["height"])}
            row |= {name: row[name] + value for name, value in changed.items()}
            row |= {"p_value": float(self.rng.integers(1, 5)) / 4, "is_anomalous": False}
            if model_id:
                row.update(dict.fromkeys(("score", "p_value", "is_anomalous", *COMPARED)), error_kind="no_model")
        if count:
            output = folder.output(1)
            state = RunState(output.state_folder)
            state.start(ScoringConfig(("/no/dump",), 0.25))
            state.bind_models({} if model_id else {category: self.model_id}, self.store.uri)
            table = pa.Table.from_pylist(rows, schema=output_rows([]).schema)
            write_rows(output, table)
            write_manifest([], output.manifest)
        made = make_record(self.job, folder, self.nights, problem)
        self.nights.append(made)
        return made


@pytest.fixture
def nights(tmp_path: Path) -> Nights:
    return Nights(tmp_path)


def reasons(night: Night, category: str = "nut") -> Any:
    found = night.categories[category]
    return found.level, [change.name for change in found.changes]


def test_equal_nights_are_fine_and_a_change_is_named(nights: Nights) -> None:
    for _ in range(4):
        night = nights.add(300)
        # Three calibration images.
        assert reasons(night) == ("cannot tell", ["alarms"])
    record = night.categories["nut"]
    assert record.model_id == nights.model_id
    assert record.training_medians["brightness"] == COMPARED.index("brightness") + 3.5
    assert abs(record.medians["brightness"] - record.training_medians["brightness"]) <= 1.5
    level, names = reasons(nights.add(300, brightness=30.0))
    assert (level, names[0]) == ("act", "brightness")


def test_a_night_expects_the_false_alarms_of_a_decided_threshold(nights: Nights) -> None:
    before = nights.add(300).categories["nut"]
    assert (before.false_alarm_rate, before.decision) == (0.25, "")
    # Of three calibration scores, two are above.
    run_models(ModelsOptions(nights.store.uri, threshold=Names(["nut=0.3"]), by="ann"))
    nights.model_id = nights.store.record("nut").model_id
    night = nights.add(300)
    assert night.categories["nut"].false_alarm_rate == 0.75
    assert night.categories["nut"].decision == str(nights.store.record("nut").decision)
    # Three images of four may be false alarms: a night of defects alone would hardly differ.
    assert reasons(night) == ("cannot tell", ["alarms"])
    assert reasons(nights.add(0)) == ("fine", [])


def test_a_night_with_a_problem_is_counted_and_not_judged_and_one_without_images_is(nights: Nights) -> None:
    assert nights.add(0).categories == {}
    nights.add(300)
    night = nights.add(10, problem="storage is down")
    assert (night.total.images, reasons(night)) == (10, ("not judged", []))
    assert nights.add(0, problem="storage is down").categories == {}
    # Neither are its images, which are perhaps not all, compared with those of later nights.
    for _ in range(7):
        nights.add(300)
    night = nights.add(0)
    assert reasons(night) == ("act", ["images"])
    assert (night.categories["nut"].images, night.categories["nut"].model_id) == (0, nights.model_id)


def test_images_that_no_model_scores_are_a_reason_to_act(nights: Nights) -> None:
    night = nights.add(5, category="bolt", model_id="none")
    assert reasons(night, "bolt") == ("act", ["model"])
    assert (night.total.images, night.total.errors) == (5, {"no_model": 5})


def test_a_model_that_was_removed_is_named_while_images_come(nights: Nights) -> None:
    nights.add(300)
    storage.remove(nights.store.folder("nut"))
    night = nights.add(300)
    assert reasons(night) == ("act", ["model"])
    assert f"no model {nights.model_id}" in night.categories["nut"].reasons[0]
    assert night.categories["nut"].training_medians == {}
    # A product that is no longer made leaves the page. None of one earlier night may be chance.
    assert [reasons(nights.add(0)) for _ in range(30)] == [("fine", [])] * 30
    assert nights.add(0).categories == {}


KINDS = ("empty", "damaged", "no_model")


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Make rows of three categories, some with an error."""
    rng = np.random.default_rng(seed)
    uris = [f"s3://dump/{seed}/{number}.png" for number in range(count)]
    rows = output_rows(
        [
            {"image_id": int(rng.integers(-(2**62), 2**62)), "uri": uri, "category": f"c{rng.integers(3)}"}
            for uri in uris
        ]
    ).to_pylist()
    nulls = dict.fromkeys(("score", "p_value", "is_anomalous", *COMPARED))
    for row in rows:
        if rng.random() < 0.3:
            row.update(nulls, error_kind=str(rng.choice(KINDS)), error_message=row["uri"], model_id="")
        else:
            row["model_id"] = str(rng.choice(["old", "new", "new"]))
    return rows


def write(folder: Path, name: str, rows: list[dict[str, Any]], size: int) -> RunOutput:
    output, table = RunOutput.named(str(folder), name), pa.Table.from_pylist(rows, schema=output_rows([]).schema)
    for start in range(0, len(rows), size):
        write_rows(output, table.slice(start, size), start)
    return output


@pytest.mark.parametrize("batch", [7, 100_000])
def test_counts_and_samples_are_those_of_all_rows(tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(night_record, "_BATCH", batch)
    monkeypatch.setattr(night_record, "SAMPLE", 20)
    first, second = make_rows(200, 0), make_rows(30, 1)
    categories, found = read_rows([write(tmp_path, "001", first, 13), write(tmp_path, "002", second, 30)])
    assert sorted(categories) == ["c0", "c1", "c2"]
    for name, counted in categories.items():
        own = [row for row in first + second if row["category"] == name]
        scored = sorted((row for row in own if not row["error_kind"]), key=lambda row: int(row["image_id"]))
        assert (counted.images, counted.alarms) == (len(own), sum(row["is_anomalous"] for row in scored))
        assert counted.errors == Counter(row["error_kind"] for row in own if row["error_kind"])
        assert counted.models == Counter(row["model_id"] for row in scored)
        sample = counted.sample()
        assert list(sample) == ["p_value", *COMPARED]
        for column, values in sample.items():
            np.testing.assert_array_equal(values, np.array([row[column] for row in scored[:20]], np.float32))
    examples = Counter(example["kind"] for example in found)
    assert examples == dict.fromkeys(KINDS, 3)
    assert [example["kind"] for example in found] == sorted(examples.elements())
    assert read_rows([RunOutput.named(str(tmp_path), "003")]) == ({}, ())
