from __future__ import annotations

import dataclasses
import json
import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from stpm import storage
from stpm.calibration import calibrate
from stpm.errors import DataError, ModelError
from stpm.matching import level_statistics
from stpm.models import ModelStore
from stpm.networks import architecture_of, build_student, load_teacher
from stpm.recipe import Recipe
from stpm.record import FitSummary, ModelRecord
from tests.conftest import preprocessing_of

SUMMARY = FitSummary(1.0, 2, 2, 0.5, 0.6, 6, 2, 5, "cpu")


def save(store: ModelStore, recipe: Recipe, category: str = "nut", seed: int = 0) -> ModelRecord:
    teacher = store.put_teacher(load_teacher(recipe.teacher, recipe.teacher_weights, recipe.levels))
    return store.save(
        category=category,
        recipe=recipe,
        preprocessing=preprocessing_of(64, 48, "fit"),
        precision="float32",
        teacher_digest=teacher,
        data_fingerprint="f",
        student=build_student(architecture_of(recipe.teacher), recipe.levels, seed, False).net.state_dict(),
        calibration=calibrate(np.random.default_rng(0).random((5, 8, 8), np.float32)),
        statistics=level_statistics([torch.rand(4, 3, 3), torch.rand(4, 2, 2)]),
        picture=b"png",
        history=pa.table({"number": [1, 2], "train_loss": [0.7, 0.5]}),
        fit=SUMMARY,
    )


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> ModelStore:
    return ModelStore(str(tmp_path) if request.param == "local" else memory)


def test_loading_never_tries_the_network(tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ModelStore(str(tmp_path))
    recipe = dataclasses.replace(tiny, teacher="test_resnet.r160_in1k")
    record = save(store, recipe)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(f"the network was tried: {arguments}")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    store.load("nut")
    store.load_teacher(recipe.teacher, recipe.levels, record.teacher_digest)


def test_what_is_saved_loads(store: ModelStore, tiny: Recipe) -> None:
    record = save(store, tiny)
    model = store.load("nut")
    assert model.record == record == store.record("nut")
    assert model.record.preprocessing == preprocessing_of(64, 48, "fit")
    expected = build_student(tiny.teacher, tiny.levels, 0, False).net.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.student.net.state_dict().items())
    assert not model.student.training
    np.testing.assert_array_equal(
        model.calibration.scores, calibrate(np.random.default_rng(0).random((5, 8, 8), np.float32)).scores
    )
    assert store.history(record)["train_loss"].to_pylist() == [0.7, 0.5]
    assert store.load_teacher(tiny.teacher, tiny.levels, record.teacher_digest).channels == model.student.channels
    assert store.categories() == ["nut"]
    assert model.statistics
    assert [tuple(level.mean.shape) for level in model.statistics] == [(3, 3), (2, 2)]
    assert all((level.deviation > 0).all() for level in model.statistics)


def test_a_store_holds_plain_files_and_its_teacher_once(store: ModelStore, tiny: Recipe) -> None:
    for category in ("a", "b"):
        save(store, tiny, category)
    names = sorted(uri.removeprefix(store.uri).lstrip("/").split("/root/")[-1] for uri, _ in storage.files(store.uri))
    assert len([n for n in names if n.startswith("teachers/")]) == 1
    assert {n.rsplit(".", 1)[-1] for n in names} == {"json", "parquet", "png", "safetensors"}
    assert len(names) == 2 * 6 + 1


def test_a_new_model_takes_the_place_of_the_old(store: ModelStore, tiny: Recipe) -> None:
    first = save(store, tiny)
    second = save(store, tiny, seed=1)
    assert store.record("nut").model_id == second.model_id != first.model_id


def test_without_a_record_there_is_no_model(store: ModelStore, tiny: Recipe) -> None:
    save(store, tiny)
    storage.remove(storage.join(store.uri, "nut", "model.json"))
    with pytest.raises(ModelError, match="no model for category 'nut'"):
        store.load("nut")
    with pytest.raises(ModelError, match="no models here; fit some"):
        store.categories()


@pytest.mark.parametrize("file", ["student.safetensors", "calibration.parquet"])
def test_damage_is_noticed(store: ModelStore, tiny: Recipe, file: str) -> None:
    save(store, tiny)
    uri = storage.join(store.uri, "nut", file)
    data = bytearray(storage.read(uri))
    data[len(data) // 2] ^= 1
    storage.publish(uri, bytes(data))
    with pytest.raises(ModelError, match=rf"{file}: its SHA-256 is .* expected; fit the model again"):
        store.load("nut")


def test_a_damaged_teacher_is_noticed(store: ModelStore, tiny: Recipe) -> None:
    record = save(store, tiny)
    storage.publish(storage.join(store.uri, "teachers", f"{record.teacher_digest}.safetensors"), b"x")
    with pytest.raises(ModelError, match="its SHA-256 is"):
        store.load_teacher(tiny.teacher, tiny.levels, record.teacher_digest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99, this version reads 2"),
        ({"surprise": 1}, "surprise"),
        ({"heatmap_scale": {"low": 1}}, "edge"),
        ({"recipe": {"levels": [1], "size": "64", "epochs": 0}}, "epochs is 0"),
        ({"recipe": {"levels": [1], "size": "big"}}, "'big' is not a size"),
        ({"preprocessing": {"height": 3}}, "mean"),
    ],
)
def test_a_foreign_record_says_what_differs(
    store: ModelStore, tiny: Recipe, change: dict[str, object], message: str
) -> None:
    record = save(store, tiny)
    foreign = json.dumps(dataclasses.asdict(record) | change).encode()
    storage.publish(storage.join(store.uri, "nut", "model.json"), foreign)
    with pytest.raises(ModelError, match=message):
        store.record("nut")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_record_that_is_no_record(store: ModelStore, tiny: Recipe, content: bytes) -> None:
    save(store, tiny)
    storage.publish(storage.join(store.uri, "nut", "model.json"), content)
    with pytest.raises(ModelError, match=r"model.json"):
        store.record("nut")


def test_a_category_that_may_not_be_a_path_is_refused(store: ModelStore) -> None:
    with pytest.raises(DataError, match=r"'../nut' holds the character '/'"):
        store.load("../nut")
