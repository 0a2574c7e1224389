from __future__ import annotations

import dataclasses
import json
import socket
from pathlib import Path
from typing import Any

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
from tests.conftest import MODELS, make_preprocessing
from tests.datasets import fitted_categories

FIT = FitRecord(1.0, 2, 2, 0.5, 0.6, 6, 2, 5, "cpu")
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
            banks.append(fit_bank(descriptors, DescriptorSpec(level, kind, window, stride), recipe.memory, seed))
    return tuple(banks)


def make_student(recipe: Recipe, seed: int = 0) -> StateDict | None:
    if recipe.student == "none":
        return None
    return build_seeded_backbone(recipe.teacher, recipe.levels, seed, False).net.state_dict()


def make_scales(recipe: Recipe) -> tuple[DistanceScale, ...]:
    """Make a different scale for each of the recipe's parts."""
    parts = len(recipe.levels) * (recipe.student != "none") + len(make_banks(recipe))
    return tuple(DistanceScale(i - 1.5, i + 0.25) for i in range(parts))


def test_load_refuses_changed_record(store: ModelStore, any_model: Recipe) -> None:
    save(store, any_model)
    uri = stored(store, "model.json")
    values = json.loads(storage.read(uri))
    storage.publish(uri, json.dumps(values | {"distance_scales": values["distance_scales"][1:]}).encode())
    with pytest.raises(ModelError, match=r"/model\.json: its contents are those of nut-.*; fit the model again"):
        store.load("nut")


def stored(store: ModelStore, name: str) -> str:
    """Return the URI of a file of the current model."""
    return storage.join(store.folder("nut"), store.current("nut").model_id, name)


def save(store: ModelStore, recipe: Recipe, category: str = "nut", seed: int = 0) -> ModelRecord:
    teacher = store.put_teacher(load_teacher_weights(recipe.teacher, recipe.teacher_weights, recipe.levels))
    preprocessing, scale = make_preprocessing(64, 48, "fit"), CALIBRATION.scale
    return store.save(
        ModelRecord(category, recipe, preprocessing, "float32", teacher, scale, make_scales(recipe), FIT),
        encode_model(
            make_student(recipe, seed),
            make_banks(recipe, seed),
            pa.table({"score": CALIBRATION.scores, "is_added": [False] * len(CALIBRATION.scores)}),
            IMAGE_STATISTICS,
            pa.table({"number": [1, 2], "train_loss": [0.7, 0.5]}),
        ),
        "fingerprint",
    )


@pytest.fixture
def store(root: str) -> ModelStore:
    return ModelStore(root)


def test_load_uses_no_network(tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ModelStore(str(tmp_path))
    recipe = dataclasses.replace(tiny, teacher="test_resnet.r160_in1k")
    record = save(store, recipe)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(f"the network was tried: {arguments}")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    store.load("nut")
    store.load_teacher(recipe.teacher, recipe.levels, record.teacher_digest)


def test_save_and_load_round_trip(store: ModelStore, any_model: Recipe) -> None:
    record = save(store, any_model)
    model = store.load("nut")
    assert model.record == record == store.record("nut")
    assert record.recipe == any_model
    assert record.preprocessing == make_preprocessing(64, 48, "fit")
    assert record.distance_scales == make_scales(any_model)
    np.testing.assert_array_equal(model.calibration.scores, CALIBRATION.scores)
    assert model.calibration.scale == CALIBRATION.scale
    assert store.image_statistics(record).equals(IMAGE_STATISTICS)
    assert fitted_categories(store.uri) == ["nut"]
    expected, student = make_student(any_model), model.student
    assert (student is None) == (expected is None)
    if student and expected:
        assert student.keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in student.items())
        assert store.history(record)["train_loss"].to_pylist() == [0.7, 0.5]
    else:
        assert store.history(record).num_rows == 0


def test_load_restores_memory_bit_for_bit(store: ModelStore, any_model: Recipe) -> None:
    save(store, any_model)
    expected, found = make_banks(any_model), store.load("nut").memory
    assert len(found) == len(expected) == (4 if any_model.memory else 0)
    for one, other in zip(found, expected, strict=True):
        assert one.spec == other.spec
        for name in ("mean", "whitening", "vectors"):
            loaded, made = getattr(one, name), getattr(other, name)
            assert loaded.dtype == torch.float32
            assert torch.equal(loaded, made)
        features = torch.randn(3, 60 + one.spec.level_index, 9, 7)
        assert torch.equal(one.distance_map(features), other.distance_map(features))


COMMON_FILES = {"current.json", "model.json", "calibration.parquet", "image_statistics.parquet"}
STUDENT_FILES = {"student.safetensors", "history.parquet"}
MEMORY_FILES = {"memory.safetensors"}
FILES = {
    "student": COMMON_FILES | STUDENT_FILES,
    "student and memory": COMMON_FILES | STUDENT_FILES | MEMORY_FILES,
    "memory": COMMON_FILES | MEMORY_FILES,
}


def file_names(store: ModelStore, category: str) -> set[str]:
    """List the names of a category's files."""
    return {uri.rsplit("/", 1)[1] for uri in storage.files(storage.join(store.uri, category))}


@pytest.mark.parametrize("kind", FILES)
def test_store_has_expected_files_and_one_teacher(store: ModelStore, kind: str) -> None:
    for category in ("a", "b"):
        save(store, MODELS[kind], category)
        assert file_names(store, category) == FILES[kind]
    assert len(file_names(store, "teachers")) == 1


@pytest.mark.parametrize("before", FILES)
@pytest.mark.parametrize("after", FILES)
def test_save_keeps_older_models(store: ModelStore, before: str, after: str) -> None:
    first = save(store, MODELS[before])
    old = {uri: storage.read(uri) for uri in storage.files(store.folder("nut")) if first.model_id in uri}
    assert len(old) == len(FILES[before]) - 1
    second = save(store, MODELS[after], seed=1)
    assert store.record("nut").model_id == second.model_id != first.model_id
    assert store.load("nut").record == second
    assert store.load("nut", first.model_id).record == store.record("nut", first.model_id) == first
    assert {uri: storage.read(uri) for uri in old} == old
    with pytest.raises(ModelError, match="no model nut-1 for category 'nut'"):
        store.load("nut", "nut-1")


def test_save_of_same_model_changes_nothing_and_repairs_damage(store: ModelStore) -> None:
    first = save(store, MODELS["student and memory"])
    save(store, MODELS["student"])
    uris = [uri for uri in storage.files(store.folder("nut")) if first.model_id in uri]
    before = {uri: storage.read(uri) for uri in uris}
    assert save(store, MODELS["student and memory"]) == first == store.load("nut").record
    assert {uri: storage.read(uri) for uri in uris} == before
    storage.publish(uris[-1], b"x")
    with pytest.raises(ModelError, match="its SHA-256 is"):
        store.verify(first)
    store.verify(save(store, MODELS["student and memory"]))


def test_model_id_depends_on_student_and_memory(store: ModelStore) -> None:
    recipes = [MODELS["student"], MODELS["student and memory"], MODELS["memory"]]
    ids = [save(store, recipe, seed=seed).model_id for recipe in recipes for seed in (0, 1)]
    assert len(set(ids)) == 6
    assert save(store, recipes[1]).model_id == ids[2]


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
    assert store.record("nut").model_id == record.model_id
    assert dataclasses.replace(record, created="later", library_versions={}).model_id == record.model_id


def test_a_model_of_another_category_is_refused(store: ModelStore, tiny: Recipe) -> None:
    """As after `cp -r nut bolt`, or on a disk where `nut` and `Nut` are one folder."""
    save(store, tiny)
    for uri in storage.files(store.folder("nut")):
        storage.publish(uri.replace("/nut/", "/bolt/", 1), storage.read(uri))
    with pytest.raises(
        ModelError, match=r"model\.json: its contents are those of nut-.* of category 'nut'; fit the mod"
    ):
        store.record("bolt")


def test_a_missing_model_whose_name_is_there_in_another_unicode_form_is_named(store: ModelStore, tiny: Recipe) -> None:
    save(store, tiny, "Geha\u0308use")
    with pytest.raises(NoModelError, match=r"two Unicode forms; rename one$"):
        store.record("Geh\u00e4use")
    with pytest.raises(NoModelError, match=r"stpm models --models .* lists them$"):
        store.record("\u00e4")


def test_missing_models_are_not_looked_for_among_all_others(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(300):
        storage.publish(f"{memory}/part {number}/current.json", b"{}")
    requests: list[str] = []
    for name in ("cat_file", "exists", "ls"):
        original = getattr(MemoryFileSystem, name)

        def count(self: Any, path: str, *rest: Any, _name: str = name, _original: Any = original, **more: Any) -> Any:
            requests.append(f"{_name} {path}")
            return _original(self, path, *rest, **more)

        monkeypatch.setattr(MemoryFileSystem, name, count)
    missing = [f"Teil \u00fc {number}" for number in range(20)]
    for category in missing:
        with pytest.raises(NoModelError):
            ModelStore(memory).record(category)
    # Of each, current.json under its name and under that in the other Unicode form.
    assert len(requests) <= 2 * len(missing)


def test_load_refuses_missing_or_empty_records(store: ModelStore, tiny: Recipe) -> None:
    save(store, tiny)
    storage.remove(stored(store, "model.json"))
    with pytest.raises(ModelError, match=r"no model nut-.* for category 'nut'"):
        store.load("nut")
    storage.publish(storage.join(store.folder("nut"), "current.json"), b"")
    with pytest.raises(ModelError, match=r"current\.json: cannot be read"):
        store.load("nut")
    storage.remove(storage.join(store.folder("nut"), "current.json"))
    with pytest.raises(ModelError, match="no model for category 'nut'"):
        store.load("nut")


@pytest.mark.parametrize("file", ["student.safetensors", "memory.safetensors", "calibration.parquet"])
def test_load_refuses_damaged_files(store: ModelStore, file: str) -> None:
    save(store, MODELS["student and memory"])
    uri = stored(store, file)
    data = bytearray(storage.read(uri))
    data[len(data) // 2] ^= 1
    storage.publish(uri, bytes(data))
    with pytest.raises(ModelError, match=rf"{file}: its SHA-256 is .* expected; remove the file, and fit the mod"):
        store.load("nut")


def test_load_teacher_refuses_damaged_file(store: ModelStore, tiny: Recipe) -> None:
    record = save(store, tiny)
    storage.publish(storage.join(store.uri, "teachers", f"{record.teacher_digest}.safetensors"), b"x")
    with pytest.raises(ModelError, match="its SHA-256 is"):
        store.load_teacher(tiny.teacher, tiny.levels, record.teacher_digest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "ModelRecord.format is 99, not of type"),
        ({"surprise": 1}, "ModelRecord has missing or unknown fields: surprise"),
        ({"heatmap_scale": {"low": 1.0}}, "heatmap_scale has missing or unknown fields: good_max"),
        ({"recipe.epochs": 0}, "epochs is 0"),
        ({"recipe.epochs": "5"}, "recipe.epochs is '5', not of type int"),
        ({"recipe.epochs": True}, "recipe.epochs is True, not of type int"),
        ({"recipe.levels": [1, "2"]}, "recipe.levels is '2', not of type int"),
        ({"recipe.keep": "first"}, "recipe.keep is 'first'"),
        ({"recipe.size": "big"}, "'big' is not a size"),
        ({"recipe.size": 64}, "recipe.size is 64, not of type Size"),
        ({"fit.seconds": "1.5"}, "fit.seconds is '1.5', not of type float"),
        ({"fit.train_loss": "low"}, "fit.train_loss is 'low', not of type float"),
        ({"heatmap_scale.low": "0.1"}, "heatmap_scale.low is '0.1', not of type float"),
        ({"distance_scales": [{"low": 1.0}]}, "distance_scales has missing or unknown fields: high"),
        ({"preprocessing.height": 64.5}, "preprocessing.height is 64.5, not of type int"),
        ({"preprocessing.mean": [0.5, 0.5]}, "its contents are those of nut-"),
        ({"files": {"student.safetensors": "0"}}, "files.student.safetensors is '0', not of type StoredFile"),
    ],
)
def test_record_of_wrong_fields_or_types_is_refused(
    store: ModelStore, tiny: Recipe, change: dict[str, object], message: str
) -> None:
    values = json.loads(json.dumps(dataclasses.asdict(save(store, tiny))))
    for name, value in change.items():
        *parents, field = name.split(".")
        (values[parents[0]] if parents else values)[field] = value
    storage.publish(stored(store, "model.json"), json.dumps(values).encode())
    with pytest.raises(ModelError, match=message):
        store.record("nut")


def test_record_accepts_integers_in_float_fields(store: ModelStore, tiny: Recipe) -> None:
    record = save(store, tiny)
    values = json.loads(json.dumps(dataclasses.asdict(record)))
    values["fit"]["seconds"] = 3
    storage.publish(stored(store, "model.json"), json.dumps(values).encode())
    assert store.record("nut") == dataclasses.replace(record, fit=dataclasses.replace(record.fit, seconds=3.0))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_record_refuses_other_bytes(store: ModelStore, tiny: Recipe, content: bytes) -> None:
    save(store, tiny)
    storage.publish(stored(store, "model.json"), content)
    with pytest.raises(ModelError, match=r"model.json"):
        store.record("nut")


def test_load_refuses_unsafe_category(store: ModelStore) -> None:
    with pytest.raises(DataError, match=r"'../nut' holds the character '/'"):
        store.load("../nut")
