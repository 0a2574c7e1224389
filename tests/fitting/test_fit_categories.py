"""What happens before any worker starts; the test takes the place of the worker group."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from stpm import storage
from stpm.commands import COMMANDS
from stpm.data import mvtec
from stpm.errors import DataError, ModelError
from stpm.fitting.fit_categories import count_good_images, fit_categories, read_categories
from stpm.fitting.options import CategoryOptions, WorkerOptions
from stpm.fitting.task import FitResult
from stpm.method.recipe import Recipe
from stpm.models.store import ModelStore
from stpm.options import ClusterOptions
from tests.conftest import MODELS, fail_to_read
from tests.datasets import make_category


def categories(root: Path, **images: int) -> list[mvtec.Category]:
    for name, count in images.items():
        make_category(str(root / "data"), name, train=count, good=0, defects=0)
    return [mvtec.read_category(str(root / "data"), name) for name in images]


def fit(
    data: list[mvtec.Category], recipe: Recipe, store: str | Path, own: Sequence[CategoryOptions] = ()
) -> list[FitResult]:
    return fit_categories(data, recipe, {0: str(store)}, WorkerOptions(), ClusterOptions(), False, own)


def test_category_with_too_few_images_fails_before_fitting(
    tmp_path: Path, fitted_keys: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    results = fit(categories(tmp_path, enough=3, few=2), MODELS["memory"], str(tmp_path / "models"))
    assert fitted_keys == ["enough (seed 0)"]
    assert {result.task.category: bool(result.record) for result in results} == {"few": False, "enough": True}
    assert "few (seed 0): failed: good images: 2; this recipe needs at least 3" in caplog.messages[0]


def test_categories_whose_names_differ_only_in_case_are_refused(tmp_path: Path) -> None:
    categories(tmp_path, nut=8, Nut=8, bolt=8)
    usable, failures = read_categories(str(tmp_path / "data"), ())
    assert [category.name for category in usable] == ["bolt"]
    assert failures == dict.fromkeys(["Nut", "nut"], "another category's name differs only in case; rename one of them")
    # One of them alone may be named.
    assert [category.name for category in read_categories(str(tmp_path / "data"), ["nut", "nut"])[0]] == ["nut"]


@pytest.mark.parametrize("name", ["nut/current.json", "model.json", ""])
def test_a_model_that_storage_does_not_give_is_not_replaced(
    tmp_path: Path, fitted_keys: list[str], tiny: Recipe, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    data, store = categories(tmp_path, nut=8, bolt=8), str(tmp_path / "models")
    fit(data[:1], tiny, store)
    before = ModelStore(store).versions("nut")
    list_sizes = storage.file_sizes

    def fail_to_list(uri: str) -> list[tuple[str, int]]:
        if uri.endswith(name):
            raise OSError("503 Slow Down")
        return list_sizes(uri)

    name = name or before.current.model_id
    fail_to_read(monkeypatch, OSError("503 Slow Down"), [name] if "." in name else [])
    monkeypatch.setattr(storage, "file_sizes", fail_to_list)
    results = fit(data, tiny, store)
    reasons = {result.task.category: result.reason for result in results}
    assert f"{name}: cannot be read" in reasons["nut"]
    assert reasons["bolt"] == ""
    assert fitted_keys == ["nut (seed 0)", "bolt (seed 0)"]
    monkeypatch.undo()
    assert ModelStore(store).versions("nut") == before


@pytest.mark.parametrize(
    ("file", "cut"),
    [("student.safetensors", True), ("memory.safetensors", False), ("calibration.parquet", True), ("fit.html", False)],
)
def test_damaged_model_is_reported_and_fitted_again(
    tmp_path: Path, fitted_keys: list[str], file: str, cut: bool, caplog: pytest.LogCaptureFixture
) -> None:
    data, store, recipe = categories(tmp_path, nut=8, bolt=8), str(tmp_path / "models"), MODELS["student and memory"]
    for _ in range(2):
        fit(data, recipe, store)
    assert len(fitted_keys) == 2
    (damaged,) = (tmp_path / "models" / "nut").rglob(file)
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1]) if cut else damaged.unlink()
    caplog.clear()
    results = fit(data, recipe, store)
    assert fitted_keys[2:] == ["nut (seed 0)"]
    assert all(result.record for result in results)
    (message,) = [each for each in caplog.messages if "fitted again" in each]
    assert message.startswith("nut (seed 0): fitted again: ")
    assert f"{file}: {f'has {len(whole) - 1} bytes, {len(whole)} expected' if cut else 'no such file'}" in message
    assert damaged.read_bytes() == whole
    fit(data, recipe, store)
    assert len(fitted_keys) == 3


def test_a_fit_that_is_started_again_reads_records_alone(tmp_path: Path, fitted_keys: list[str], tiny: Recipe) -> None:
    store, names = tmp_path / "models", [f"nut{number}" for number in range(5)]
    data = categories(tmp_path, **dict.fromkeys(names, 8))

    def read_by_fit(count: int) -> int:
        """Fit so many categories; return the bytes that this process has read meanwhile."""
        before = int(Path("/proc/self/io").read_text().split()[1])
        fit(data[:count], tiny, store)
        return int(Path("/proc/self/io").read_text().split()[1]) - before

    read_by_fit(5)
    one, five = (read_by_fit(count) for count in (1, 5))
    assert len(fitted_keys) == 5
    small = sum(path.stat().st_size for name in names[1:] for path in (store / name).rglob("*.json"))
    weights = sum(path.stat().st_size for name in names[1:] for path in (store / name).rglob("*.safetensors"))
    assert five - one < 4 * small < weights / 4


def test_a_changed_byte_is_found_when_the_model_is_loaded_and_repaired_once_the_file_is_removed(
    tmp_path: Path, fitted_keys: list[str], tiny: Recipe
) -> None:
    data, store = categories(tmp_path, nut=8), ModelStore(str(tmp_path / "models"))
    fit(data, tiny, store.uri)
    (student,) = (tmp_path / "models" / "nut").rglob("student.safetensors")
    intact = student.read_bytes()
    student.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    fit(data, tiny, store.uri)
    assert len(fitted_keys) == 1
    with pytest.raises(ModelError, match=f"{student}: its SHA-256 is .*; remove the file, and fit the model again"):
        store.load("nut")
    student.unlink()
    fit(data, tiny, store.uri)
    assert len(fitted_keys) == 2
    assert student.read_bytes() == intact


@pytest.mark.parametrize("contents", [None, b"{"])
def test_a_damaged_current_model_does_not_stop_a_fit_that_others_wait_for(
    tmp_path: Path, fitted_keys: list[str], tiny: Recipe, caplog: pytest.LogCaptureFixture, contents: bytes | None
) -> None:
    """The model after the damaged one, of the recipe and images to fit, becomes the current one by a fit."""
    data, store = categories(tmp_path, nut=8, bolt=8), ModelStore(str(tmp_path / "models"))
    longer = dataclasses.replace(tiny, epochs=3)
    for recipe in (tiny, longer):
        fit(data[:1], recipe, store.uri)
    wanted = store.record("nut").model_id
    store.set_versions("nut", store.versions("nut").roll_back())
    damaged = store.current("nut").model_id
    record = tmp_path / "models" / "nut" / damaged / "model.json"
    record.unlink() if contents is None else record.write_bytes(contents)
    caplog.clear()
    results = fit(data, longer, store.uri)
    assert fitted_keys[2:] == ["nut (seed 0)", "bolt (seed 0)"]
    assert all(result.record for result in results)
    assert store.current("nut").model_id == wanted
    assert caplog.messages[0].startswith("nut (seed 0): fitted again: ")
    assert damaged in caplog.messages[0]


def test_each_category_is_fitted_with_its_own_options_and_fitted_again_if_they_change(
    tmp_path: Path, fitted_keys: list[str], tiny: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    data, store = categories(tmp_path, nut=8, bolt=8, pill=8), ModelStore(str(tmp_path / "models"))
    other = Recipe(teacher="resnet34", **{name: value for name, value in vars(tiny).items() if name != "teacher"})
    nut = CategoryOptions("nut", MODELS["memory"], "run.yaml", threshold=0.5)
    own = [nut, CategoryOptions("bolt", other, "run.yaml")]
    assert all(result.record for result in fit(data, tiny, store.uri, own))
    assert [store.record(each.name).recipe for each in data] == [MODELS["memory"], other, tiny]
    decided = store.record("nut")
    assert decided.decision
    assert (decided.decision.threshold, decided.decision.by) == (0.5, "run.yaml")
    assert [store.record(name).decision for name in ("bolt", "pill")] == [None, None]
    # Only the category whose options changed is fitted again. A threshold is for new models: no fit changes one.
    own = [dataclasses.replace(nut, threshold=0.75), CategoryOptions("bolt", dataclasses.replace(other, epochs=3))]
    caplog.set_level("INFO")
    fit(data, tiny, store.uri, own)
    assert fitted_keys[3:] == ["bolt (seed 0)"]
    assert store.record("nut") == decided
    assert "its threshold stays; that of run.yaml is for new models" in caplog.text
    words = shlex.split(caplog.text.partition("To decide it now: stpm ")[2].splitlines()[0])
    assert main_of(words) == 0
    assert store.record("nut").threshold(np.zeros(1, np.float32), 0.01) == 0.75
    caplog.clear()
    fit(data, tiny, store.uri, own)
    assert (fitted_keys[4:], "its threshold stays" in caplog.text) == ([], False)
    fit(data, tiny, store.uri, [dataclasses.replace(nut, recipe=tiny)])
    assert store.record("nut").threshold(np.zeros(1, np.float32), 0.01) == 0.5


def main_of(words: list[str]) -> int:
    name, *argv = words
    return COMMANDS[name](argv)


@pytest.mark.parametrize("wanted", [[], ["nut"]])
def test_options_of_a_category_that_is_not_there_are_refused_by_name(tmp_path: Path, wanted: list[str]) -> None:
    categories(tmp_path, nut=8, bottle=8)
    own = [CategoryOptions(name, MODELS["student"], "run.yaml") for name in ("nut", "botle")]
    message = r"categories in run\.yaml: .*/data: no category botle; did you mean bottle\? there are bottle, nut"
    with pytest.raises(DataError, match=message):
        read_categories(str(tmp_path / "data"), wanted, own=own)
    assert [each.name for each in read_categories(str(tmp_path / "data"), ["nut"], own=own[:1])[0]] == ["nut"]


def test_good_images_are_counted_with_those_that_calibrate(tmp_path: Path, tiny: Recipe) -> None:
    data = categories(tmp_path, nut=8)
    assert count_good_images(data, tiny) == {"nut": (8, 2)}
    assert count_good_images(data, dataclasses.replace(MODELS["memory"], calibration_folds=2)) == {"nut": (8, 8)}
    own = [CategoryOptions("nut", dataclasses.replace(tiny, held_out_fraction=0.5))]
    assert count_good_images(data, tiny, own) == {"nut": (8, 4)}
    few = dataclasses.replace(data[0], train=data[0].train[:1])
    assert count_good_images([few], tiny) == {}
