"""Feedback: the marks of a table, and from the job's options to the store, without Ray."""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stpm import storage
from stpm.errors import DataError
from stpm.fitting.options import FitOptions, WorkerOptions
from stpm.jobs.fit import run_fit
from stpm.jobs.models import run_models
from stpm.line.feedback import read_marks
from stpm.method.calibration import Calibration, threshold
from stpm.method.recipe import Recipe
from stpm.models.options import ModelsOptions
from stpm.models.store import ModelStore
from stpm.options import ClusterOptions, Names
from tests.conftest import MODELS, Killed
from tests.datasets import make_category
from tests.scoring.stages.helpers import nut_rows, score

ROWS = [
    ("a.png", "nut", "good"),
    ("b, \"c\"\n=d 'ü' 🦆 .png", "nut", "good"),
    ("sub/e.png", "bolt", "good"),
    ("f.png", "nut", "defect"),
    ("g.png", "nut", "Good"),
    ("h.png", "nut", ""),
]

# Whose rows hold the images themselves.
IMAGES = storage.encode_parquet(pa.table({"image": [b"x"], "label": ["good"]}))


def write(path: Path, rows: Sequence[tuple[str, str, str]]) -> str:
    names = ("uri", "category", "label")
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([names, *rows])
    else:
        path.write_text("".join(f"{json.dumps(dict(zip(names, row, strict=True)))}\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("kind", [".csv", ".ndjson"])
def test_only_images_with_the_label_good_are_good(tmp_path: Path, kind: str) -> None:
    marks = read_marks(write(tmp_path / f"marks{kind}", [*ROWS, ROWS[0]]))
    nut = {f"{tmp_path}/{ROWS[0][0]}": "", f"{tmp_path}/{ROWS[1][0]}": ""}
    assert marks.good == {"nut": nut, "bolt": {f"{tmp_path}/sub/e.png": ""}}
    assert marks.other == {"defect": 1, "Good": 1, "": 1}
    assert marks.refused == {}
    assert list(read_marks(str(tmp_path / f"marks{kind}"), categories=["bolt"]).good) == ["bolt"]


def test_a_table_names_only_what_scoring_would_allow(tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    outside = [(f"{tmp_path}/x.png", "nut", "good"), ("../x.png", "nut", "good"), ("s3://b/x.png", "nut", "good")]
    uri = write(tmp_path / "marks" / "m.jsonl", [*outside, ("in.png", "nut", "good"), ("", "nut", "good")])
    marks = read_marks(uri)
    assert marks.good == {"nut": {f"{tmp_path}/marks/in.png": ""}}
    assert len(marks.refused) == 4
    assert (
        f"may name only what is under {tmp_path}/marks; to allow it, give --allow s3://b"
        in marks.refused["s3://b/x.png"]
    )
    assert marks.refused[f"{tmp_path}/x.png"].endswith(f"give --allow {tmp_path}")
    assert marks.refused[f"{uri}#4"] == "this row of the table has no uri"
    found = read_marks(uri, ["s3://b", str(tmp_path)]).good["nut"]
    assert list(found) == [f"{tmp_path}/x.png", "s3://b/x.png", f"{tmp_path}/marks/in.png"]


def test_only_images_to_be_added_are_refused(tmp_path: Path) -> None:
    rows = [
        ("/elsewhere/d.png", "nut", "defect"),
        ("/elsewhere/o.png", "bolt", "good"),
        ("", "nut", "good"),
        ("", "nut", "good"),
        ("", "nut", ""),
        ("https://me:SECRET@h/a.png", "nut", "good"),
        ("https://h/b.png?X-Amz-Signature=SECRET", "nut", "good"),
        ("https://h/b.png?X-Amz-Signature=SECRET", "nut", "defect"),
    ]
    marks = read_marks(uri := write(tmp_path / "m.csv", rows), ["https://h"], ["nut"])
    assert marks.good == {}
    assert marks.other == {"defect": 2, "": 1}
    assert list(marks.refused) == [f"{uri}#{number}" for number in (2, 3, 5, 6)]
    assert "https://h/...: this URI holds a query" in marks.refused[f"{uri}#6"]
    assert "SECRET" not in str(marks)


def test_an_image_that_is_good_and_something_else_is_refused(tmp_path: Path) -> None:
    labels = ("good", "defect", "scratch", "scratch", "dent")
    rows = [(name, "nut", label) for name, label in zip("aabbb", labels, strict=True)]
    marks = read_marks(write(tmp_path / "m.jsonl", [(f"{name}.png", *rest) for name, *rest in rows]))
    assert marks.good == {}
    assert marks.other == {"scratch": 1, "dent": 1}
    assert marks.refused == {f"{tmp_path}/a.png": "it is marked as 'defect' and as 'good'"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("marks.txt", b"a.png", r"a table is a file of \.parquet, "),
        ("images.parquet", IMAGES, "no column `uri`; its columns are label"),
        ("nowhere.jsonl", None, "this table cannot be read"),
    ],
)
def test_an_unreadable_table_is_one_error(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_marks(str(tmp_path / name))


RATE = 0.3
NUT = Names(["nut"])


class Plant:
    """A data set with the category `nut`, whose model is fitted, and good images of later nights."""

    def __init__(self, root: str, recipe: Recipe) -> None:
        self.root, self.recipe = root, recipe
        self.store = ModelStore(f"{root}/models")
        make_category(f"{root}/data", "nut", train=10)
        make_category(f"{root}/nights", "nut", good=6, seed=1)
        assert self.fit() == 0

    def fit(self, **options: Any) -> int:
        data = "" if options else f"{self.root}/data"
        found = FitOptions(data, self.store.uri, false_alarm_rate=RATE, **options)
        return run_fit(found, self.recipe, WorkerOptions(), ClusterOptions(backend="pytorch"))

    def good(self, *numbers: int) -> list[str]:
        return [f"{self.root}/nights/nut/test/good/{number:03}.png" for number in numbers]

    def add(self, uris: Sequence[str], **options: Any) -> int:
        rows = [{"uri": uri, "category": "nut", "label": "good"} for uri in uris]
        storage.publish(table := f"{self.root}/marks.jsonl", "\n".join(map(json.dumps, rows)).encode())
        return self.fit(add_good=table, **options)

    def scores(self, uris: Sequence[str]) -> np.ndarray:
        """Score images with the current model, by the stages of scoring."""
        return score(Path(self.root), nut_rows(uris))["score"].to_numpy().astype(np.float32)

    def calibration(self) -> Calibration:
        return self.store.load("nut").calibration


@pytest.fixture
def plant(tmp_path: Path, fitted_keys: list[str], any_model: Recipe) -> Plant:
    plant = Plant(str(tmp_path), dataclasses.replace(any_model, held_out_fraction=0.4))
    fitted_keys.clear()
    return plant


@pytest.fixture
def student(tmp_path: Path, fitted_keys: list[str]) -> Plant:
    plant = Plant(str(tmp_path), MODELS["student"])
    fitted_keys.clear()
    return plant


def test_added_images_calibrate(plant: Plant, fitted_keys: list[str], caplog: pytest.LogCaptureFixture) -> None:
    before, uris = plant.store.record("nut"), plant.good(0, 1, 2)
    changing = ("calibration.parquet", "image_statistics.parquet")
    weights = {name: digest for name, digest in before.files.items() if name not in changing}
    old, expected = plant.calibration(), plant.scores(uris)
    assert plant.add(uris) == 0
    record, new = plant.store.record("nut"), plant.calibration()
    np.testing.assert_allclose(new.scores, np.sort(np.concatenate([old.scores, expected])), rtol=1e-5)
    assert record.fit.calibration_count == before.fit.calibration_count + 3 == len(new.scores)
    assert record.good_count == before.good_count + 3
    assert {name: digest for name, digest in record.files.items() if name not in changing} == weights
    statistics = plant.store.image_statistics(record)
    rows = score(Path(plant.root), nut_rows(uris))
    assert statistics.slice(0, 10) == plant.store.image_statistics(before)
    for name in statistics.column_names:
        assert statistics[name].to_pylist()[10:] == rows[name].to_pylist()
    largest = [np.frombuffer(data, np.float32).max() for data in rows["anomaly_map"].to_pylist()]
    np.testing.assert_allclose(new.max_pixels, np.sort([*old.max_pixels, *largest]), rtol=1e-5)
    assert record.distance_scales == before.distance_scales
    assert new.scale.low == old.scale.low
    assert new.scale.good_max >= old.scale.good_max
    np.testing.assert_allclose(plant.scores(uris), expected, rtol=1e-6)
    assert [each.uri for each in record.added_images] == uris
    scores = plant.store.calibration_scores(record)
    held_out = scores.filter(~scores["is_added"].to_numpy())
    np.testing.assert_array_equal(held_out["score"].to_numpy(), old.scores)
    assert plant.store.load("nut", before.model_id).record == before
    # The report compares the two models by numbers that anyone can count.
    thresholds = [threshold(calibration.scores, RATE) for calibration in (old, new)]
    counts = [(limit, *((s > limit).sum() for s in (old.scores, expected))) for limit in thresholds]
    (was, was_out, was_added), (now, now_out, now_added) = counts
    n, text = len(old.scores), caplog.text
    assert (
        f"threshold {was:.4g} before, {now:.4g} after; held-out good images above it {was_out} of {n} before, " in text
    )
    assert f"{now_out} of {n} after; added good images above it {was_added} of 3 before, {now_added} of 3 after" in text
    undo = plant.store.roll_command("nut", "--roll-back")
    assert (
        f"nut: {record.model_id} is now current instead of {before.model_id}. To undo this: {undo}" in caplog.messages
    )
    assert fitted_keys == []


def test_feedback_adds_up_each_image_once(root: str, fitted_keys: list[str], caplog: pytest.LogCaptureFixture) -> None:
    student = Plant(root, MODELS["student"])
    fitted = student.store.record("nut")
    copied = f"{root}/copy.png"
    storage.publish(copied, storage.read(student.good(0)[0]))
    assert student.add([*student.good(0, 1), copied]) == 0
    first = student.store.record("nut")
    assert first.fit.calibration_count == fitted.fit.calibration_count + 2
    assert student.add(student.good(1, 2)) == 0
    second = student.store.record("nut")
    assert [each.uri for each in second.added_images] == student.good(0, 1, 2)
    assert len(student.calibration().scores) == fitted.fit.calibration_count + 3
    caplog.clear()
    assert student.add(student.good(0, 1, 2)) == 0
    assert "nut: none of the images is new to its model" in caplog.text
    # Those that were added before stay where the others cannot be added.
    name = f"{student.store.uri}/nut/{second.model_id}/image_statistics.parquet"
    content = storage.read(name)
    storage.publish(name, b"")
    assert student.add(student.good(2, 3)) == 2
    assert "1 of 2 images that are marked as good belong to models" in caplog.text
    assert student.store.record("nut") == second
    storage.publish(name, content)
    for expected in (first, fitted):
        assert run_models(ModelsOptions(student.store.uri, NUT, roll_back=True)) == 0
        assert student.store.record("nut") == expected
    assert len(fitted_keys) == 1


def test_what_cannot_be_added_is_said_and_left_out(student: Plant, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("empty", "damaged", "copy"):
        Path(f"{student.root}/{name}.png").write_bytes(b"" if name == "empty" else b"no image")
    rows = [
        (student.good(0)[0], "nut", "good"),
        (student.good(1)[0], "screw", "good"),
        (student.good(2)[0], "../nut", "good"),
        (student.good(3)[0], "", "good"),
        (f"{student.root}/empty.png", "nut", "good"),
        (f"{student.root}/nowhere.png", "nut", "good"),
        (student.good(4)[0], "nut", "defect"),
        ("/etc/hostname", "nut", "good"),
    ]
    marks = Path(f"{student.root}/marks.csv")
    before = student.store.record("nut")
    assert student.fit(add_good=write(marks, rows)) == 2
    assert len(student.store.record("nut").added_images) == 1
    assert "1 of 7 images that are marked as good belong to models" in caplog.text
    assert "only images with label 'good' are added: 1 with label 'defect'" in caplog.text
    for reason in (
        "no model for category 'screw'",
        "the image has no category",
        "the file has no bytes",
        "give --allow /etc",
    ):
        assert reason in caplog.text
    assert "Traceback" not in caplog.text
    assert student.fit(add_good=write(marks, rows[1:])) == 3
    assert student.fit(add_good=write(marks, rows[6:7])) == 0
    damaged = [(f"{student.root}/{name}.png", "nut", "good") for name in ("damaged", "copy")]
    assert student.fit(add_good=write(marks, damaged)) == 3
    assert "0 of 2 images that are marked as good belong to models" in caplog.text
    with pytest.raises(DataError, match="there is no such file"):
        student.fit(add_good=f"{student.root}/none.csv")
    assert student.store.versions("nut").previous[0].model_id == before.model_id
    assert len(student.store.versions("nut").previous) == 1


def test_a_decided_threshold_stays_but_not_in_a_new_model(student: Plant, caplog: pytest.LogCaptureFixture) -> None:
    assert run_models(ModelsOptions(student.store.uri, threshold=Names(["nut=0.125"]), by="ann")) == 0
    decided = student.store.record("nut")
    assert student.add(student.good(0, 1)) == 0
    record = student.store.record("nut")
    assert record.decision == decided.decision
    assert record.fit.calibration_count == decided.fit.calibration_count + 2
    assert f"nut: the threshold stays as it is: {decided.decision}" in caplog.messages
    assert "calibrated again: threshold 0.125 before, 0.125 after" in caplog.text
    # A fit of other images scores on another scale.
    make_category(f"{student.root}/data", "nut", train=11)
    assert student.fit() == 0
    assert student.store.record("nut").decision is None
    assert f"a new model begins without the threshold of {record.model_id}: {decided.decision}" in caplog.text


def test_a_high_score_among_the_added_is_pointed_out(student: Plant, caplog: pytest.LogCaptureFixture) -> None:
    # The teacher is untrained: not every defect scores high.
    defects = [str(path) for path in sorted(Path(f"{student.root}/nights/nut/test/square").iterdir())]
    scores = student.scores(defects)
    defect = defects[scores.argmax()]
    assert scores.max() > threshold(student.calibration().scores, RATE)
    assert student.add([defect]) == 0
    assert f"look again at the added images that scored highest: {defect} (" in caplog.text


@pytest.mark.parametrize("name", ["student.safetensors", "current.json"])
def test_feedback_that_is_cut_off_changes_nothing_and_is_completed(
    student: Plant, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before, publish = student.store.versions("nut"), storage.publish

    def publish_until(uri: str, data: bytes, **options: Any) -> None:
        if uri.endswith(name):
            raise Killed
        publish(uri, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "publish", publish_until)
        with pytest.raises(Killed):
            student.add(student.good(0))
    # The log tells a change before it is made.
    assert "nut: calibrated again: threshold " in caplog.text
    assert student.store.versions("nut") == before
    assert student.add(student.good(0)) == 0
    assert student.store.versions("nut").previous == (before.current,)
    assert [each.uri for each in student.store.load("nut").record.added_images] == student.good(0)


def test_a_fit_reuses_a_model_with_added_images(
    student: Plant, fitted_keys: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    student.add(student.good(0, 1))
    recalibrated = student.store.record("nut")
    assert student.fit() == 0
    assert fitted_keys == []
    assert student.store.record("nut") == recalibrated
    storage.publish(f"{student.root}/data/nut/train/good/new.png", storage.read(student.good(5)[0]))
    assert student.fit() == 0
    fitted = student.store.record("nut")
    assert (fitted.good_count, fitted.added_images) == (11, ())
    assert (
        f"without the images that were added to {recalibrated.model_id} (2): give their tables to --add" in caplog.text
    )
    # A fit does not bring back what was rolled back.
    run_models(ModelsOptions(student.store.uri, NUT, roll_back=True))
    caplog.clear()
    assert student.fit() == 0
    assert student.store.record("nut") == recalibrated
    assert f"model {fitted.model_id}, of this recipe and these images, was rolled back, and" in caplog.text
    assert f"stays current. To roll forward: {student.store.roll_command('nut', '--roll-forward')}" in caplog.text
    assert fitted_keys == ["nut (seed 0)"]


def test_a_new_model_takes_the_place_of_what_was_rolled_back(student: Plant, caplog: pytest.LogCaptureFixture) -> None:
    first = student.store.current("nut")
    for make in (lambda: student.add(student.good(1)), student.fit):
        student.add(student.good(0))
        undone = student.store.current("nut").model_id
        run_models(ModelsOptions(student.store.uri, NUT, roll_back=True))
        storage.publish(f"{student.root}/data/nut/train/good/new.png", storage.read(student.good(5)[0]))
        caplog.clear()
        assert make() == 0
        versions = student.store.versions("nut")
        assert versions.current.model_id not in (first.model_id, undone)
        assert f"replaces those that were rolled back ({undone}): --roll-forward no longer" in caplog.text
    # To add the same images again makes the same model current again.
    student.add(student.good(0))
    undone = student.store.current("nut")
    run_models(ModelsOptions(student.store.uri, NUT, roll_back=True))
    student.add(student.good(0))
    assert student.store.current("nut") == undone
