import dataclasses
import json
import socket
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from stpm import storage
from stpm.data.image_statistics import COMPARED
from stpm.errors import DataError, ModelError, NoModelError
from stpm.method.backbones import StateDict, build_seeded_backbone
from stpm.method.calibration import Calibration
from stpm.method.memory_bank import KINDS, DescriptorSpec, MemoryBank, fit_bank
from stpm.method.recipe import Recipe
from stpm.method.scales import DistanceScale, HeatmapScale
from stpm.method.teacher_weights import load_teacher_weights
from stpm.models.record import FitRecord, ModelRecord, StoredFile
from stpm.models.store import ModelStore, encode_model
from tests.conftest import MODELS, make_preprocessing, record_calls
from tests.datasets import fitted_categories

FIT = FitRecord(1.0, 2, 2, 0.5, 0.6, 6, 2, 5, "cpu")
PIXELS = np.array([1.5, 3.5, 2.5], np.float32)
CALIBRATION = Calibration(np.array([0.2, 0.4, 0.7], np.float32), HeatmapScale(0.25, 0.75))
IMAGE_STATISTICS = pa.table({name: np.arange(8, dtype=np.float32) + i for i, name in enumerate(COMPARED)})


def make_banks(recipe: Recipe, seed: int = 0) -> tuple[MemoryBank, ...]:
    """Fit the recipe's banks to random descriptors."""
    if not recipe.memory:
        return ()
    generator = torch.Generator().manual_seed(seed)
    banks = []
    for level, window, stride in ((1, 3, 2), (2, 1, 1)):
        for kind in KINDS:
            descriptors = torch.randn(90, 60 + level, generator=generator)
            banks.append(fit_bank(descriptors, DescriptorSpec(level, kind, window, stride), recipe.memory, seed)[0])
    return tuple(banks)


def make_student(recipe: Recipe, seed: int = 0) -> StateDict | None:
    if recipe.student == "none":
        return None
    return build_seeded_backbone(recipe.teacher, recipe.levels, seed, False).net.state_dict()


def make_scales(recipe: Recipe) -> tuple[DistanceScale, ...]:
    """Make a different scale for each of the recipe's parts."""
    parts = len(recipe.levels) * (recipe.student != "none") + len(make_banks(recipe))
    return tuple(DistanceScale(i - 1.5, i + 0.25) for i in range(parts))


def save(store: ModelStore, recipe: Recipe, category: str = "nut", seed: int = 0) -> ModelRecord:
    """Save a model of random weights."""
    teacher = store.put_teacher(load_teacher_weights(recipe.teacher, recipe.teacher_weights, recipe.levels))
    preprocessing, scale = make_preprocessing(64, 48, "fit"), CALIBRATION.scale
    return store.save(
        ModelRecord(category, recipe, preprocessing, "float32", teacher, "", scale, make_scales(recipe), FIT),
        encode_model(
            make_student(recipe, seed),
            make_banks(recipe, seed),
            pa.table({"score": CALIBRATION.scores[::-1], "max_pixel": PIXELS, "is_added": [False] * 3}),
            IMAGE_STATISTICS,
            pa.table({"number": [1, 2], "train_loss": [0.7, 0.5]}),
        ),
        "fingerprint",
    )


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(str(tmp_path))


def stored(store: ModelStore, name: str) -> str:
    """Return the URI of a file of the current model."""
    return storage.join(store.folder("nut"), store.current("nut").model_id, name)


def contents(store: ModelStore, model_id: str = "") -> dict[str, bytes]:
    """Read the files of a model of `nut`, or of all, by their URIs."""
    return {uri: storage.read(uri) for uri in storage.files(store.folder("nut")) if model_id in uri}


def test_a_model_is_loaded_without_the_network(root: str, any_model: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    store, recipe = ModelStore(root), dataclasses.replace(any_model, teacher="test_resnet.r160_in1k")
    record = save(store, recipe)
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, Mock(side_effect=AssertionError("the network was tried")))
    model = store.load("nut")
    assert model.record == record == store.record("nut")
    assert record.recipe == recipe
    assert record.preprocessing == make_preprocessing(64, 48, "fit")
    assert record.distance_scales == make_scales(recipe)
    np.testing.assert_array_equal(model.calibration.scores, CALIBRATION.scores)
    np.testing.assert_array_equal(model.calibration.max_pixels, [1.5, 2.5, 3.5])
    assert model.calibration.scale == CALIBRATION.scale
    assert store.image_statistics(record).equals(IMAGE_STATISTICS)
    assert fitted_categories(store.uri) == store.categories() == ["nut"]
    expected, student = make_student(recipe), model.student
    assert (student is None) == (expected is None)
    if student and expected:
        assert student.keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in student.items())
    assert store.history(record).to_pydict().get("train_loss") == ([0.7, 0.5] if student else None)
    assert len(model.memory) == (4 if recipe.memory else 0)
    for one, other in zip(model.memory, make_banks(recipe), strict=True):
        assert one.spec == other.spec
        for name in ("mean", "whitening", "vectors"):
            loaded, made = getattr(one, name), getattr(other, name)
            assert loaded.dtype == torch.float32
            assert torch.equal(loaded, made)
        features = torch.randn(3, 60 + one.spec.level_index, 9, 7)
        assert torch.equal(one.distance_map(features), other.distance_map(features))
    store.load_teacher(recipe.teacher, recipe.levels, record.teacher_digest)


FILES = {"student": {"student.safetensors", "history.parquet"}, "memory": {"memory.safetensors"}}
FILES["student and memory"] = FILES["student"] | FILES["memory"]


@pytest.mark.parametrize("before", FILES)
@pytest.mark.parametrize("after", FILES)
def test_a_store_has_the_expected_files_and_keeps_older_models(store: ModelStore, before: str, after: str) -> None:
    first = save(store, MODELS[before])
    old = contents(store)
    common = {"current.json", "model.json", "calibration.parquet", "image_statistics.parquet"}
    assert {uri.rpartition("/")[2] for uri in old} == common | FILES[before]
    second = save(store, MODELS[after], seed=1)
    assert store.record("nut").model_id == second.model_id != first.model_id
    assert store.load("nut").record == second
    assert store.load("nut", first.model_id).record == store.record("nut", first.model_id) == first
    assert contents(store, first.model_id).items() <= old.items()
    assert len(storage.files(f"{store.uri}/teachers")) == 1
    with pytest.raises(ModelError, match="no model nut-1 for category 'nut'"):
        store.load("nut", "nut-1")


def test_save_of_same_model_changes_nothing_and_repairs_damage(store: ModelStore) -> None:
    first = save(store, MODELS["student and memory"])
    before = contents(store, first.model_id)
    save(store, MODELS["student"])
    assert save(store, MODELS["student and memory"]) == first == store.load("nut").record
    assert contents(store, first.model_id) == before
    storage.publish([*before][-1], b"x")
    with pytest.raises(ModelError, match="its SHA-256 is"):
        store.read_files(first)
    store.read_files(save(store, MODELS["student and memory"]))
    storage.publish(stored(store, "calibration.parquet"), b"x")
    with pytest.raises(ModelError, match="its SHA-256 is"):
        store.load("nut")


def test_a_model_and_its_teacher_are_copied_to_another_store(store: ModelStore, memory: str) -> None:
    record = save(store, MODELS["student and memory"])
    other = ModelStore(memory)
    for _ in range(2):
        copied = other.copy_model(store, record, "bolt")
        assert other.load("bolt").record == copied
        assert other.read_files(copied) == store.read_files(record)
        assert other.current("bolt").data_fingerprint == "fingerprint"
        other.load_teacher(record.recipe.teacher, record.recipe.levels, record.teacher_digest)
        storage.publish(f"{memory}/teachers/{record.teacher_digest}.safetensors", b"damaged")


def test_model_id_depends_on_everything_that_affects_scores(store: ModelStore, tiny: Recipe) -> None:
    """Otherwise a run with an earlier calibration, or another way to compute scores, would count as done."""
    record = save(store, dataclasses.replace(tiny, memory=50, fusion="quantile"))
    others = [
        dataclasses.replace(record, recipe=dataclasses.replace(record.recipe, top_fraction=0.2)),
        dataclasses.replace(record, preprocessing=make_preprocessing(64, 48, "stretch")),
        dataclasses.replace(record, distance_scales=(DistanceScale(0.1, 0.7),)),
        dataclasses.replace(record, heatmap_scale=HeatmapScale(0.0, 9.0)),
        dataclasses.replace(record, files=record.files | {"calibration.parquet": StoredFile("0" * 64, 9)}),
    ]
    assert len({each.model_id for each in (record, *others)}) == 6
    assert dataclasses.replace(record, created="later", library_versions={}).model_id == record.model_id


def test_a_model_of_another_category_is_refused(store: ModelStore, tiny: Recipe) -> None:
    """As after `cp -r nut bolt`, or on a disk where `nut` and `Nut` are one folder."""
    save(store, tiny)
    for uri, data in contents(store).items():
        storage.publish(uri.replace("/nut/", "/bolt/", 1), data)
    with pytest.raises(ModelError, match=r"model\.json: its contents are those of nut-.* of category 'nut'; fit th"):
        store.record("bolt")


def test_a_missing_model_whose_name_is_there_in_another_unicode_form_is_named(store: ModelStore, tiny: Recipe) -> None:
    save(store, tiny, "Geha\u0308use")
    with pytest.raises(NoModelError, match=r"two Unicode forms; rename one$"):
        store.record("Geh\u00e4use")
    with pytest.raises(NoModelError, match=r"fit it first \(stpm fit --data DATA --models .*\)$"):
        store.record("\u00e4")
    with pytest.raises(DataError, match=r"'../nut' holds the character '/'"):
        store.load("../nut")


def test_missing_models_are_not_looked_for_among_all_others(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(300):
        storage.publish(f"{memory}/part {number}/current.json", b"{}")
    requests = [record_calls(monkeypatch, MemoryFileSystem, name) for name in ("cat_file", "exists", "ls")]
    for number in range(20):
        with pytest.raises(NoModelError):
            ModelStore(memory).record(f"Teil \u00fc {number}")
    # Of each, current.json under its name and under that in the other Unicode form.
    assert sum(map(len, requests)) <= 2 * 20


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("format", 99, "ModelRecord.format is 99, not of type"),
        ("surprise", 1, "ModelRecord has missing or unknown fields: surprise"),
        ("heatmap_scale", {"low": 1.0}, "heatmap_scale has missing or unknown fields: good_max"),
        ("recipe.epochs", 0, "epochs is 0"),
        ("recipe.levels", [1, "2"], "recipe.levels is '2', not of type int"),
        ("recipe.keep", "first", "recipe.keep is 'first'"),
        ("recipe.size", "big", "'big' is not a size"),
        ("preprocessing.mean", [0.5, 0.5], "its contents are those of nut-.*; fit the model again"),
        ("files", {"student.safetensors": "0"}, "files.student.safetensors is '0', not of type StoredFile"),
    ],
)
def test_another_record_is_refused(store: ModelStore, tiny: Recipe, name: str, value: object, message: str) -> None:
    save(store, tiny)
    values = json.loads(storage.read(stored(store, "model.json")))
    parent, _, field = name.rpartition(".")
    (values[parent] if parent else values)[field] = value
    storage.publish(stored(store, "model.json"), json.dumps(values).encode())
    with pytest.raises(ModelError, match=rf"model\.json: .*{message}"):
        store.load("nut")
