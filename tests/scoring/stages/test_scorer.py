from __future__ import annotations

import gc
import shutil
import weakref
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from stpm.detector import Detector
from stpm.method.arithmetic import Arithmetic, Capabilities
from stpm.method.teacher import Inputs, Teacher
from stpm.models.store import ModelStore
from stpm.scoring.stages.scorer import overlap
from tests.conftest import fail_to_read
from tests.scoring.stages.helpers import (
    CATEGORIES,
    current_models,
    decode,
    manifest,
    refit,
    score,
    scorer,
)


def test_pixels_and_anomaly_maps_are_kept_only_if_asked_for(run: Path) -> None:
    decoded = decode(manifest(run))
    kept, dropped = (scorer(run, overlays=overlays)(decoded) for overlays in (True, False))
    assert kept["pixels"].equals(decoded["pixels"])
    assert kept.drop(["pixels"]).equals(dropped.drop(["pixels"]))
    assert set(dropped["pixels"].to_pylist()) == {b""}
    assert dropped["anomaly_map"].null_count == dropped["region_bits"].null_count == decoded.num_rows


def test_a_model_that_could_not_be_read_is_tried_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, stage = decode(manifest(run)), scorer(run, accept_errors=True)
    down = {"student", "model.json", "teachers"}
    fail_to_read(monkeypatch, OSError("503 Slow Down"), down)
    monkeypatch.setattr("stpm.scoring.stages.detector_cache._RETRY_SECONDS", 0.0)
    for name, kinds in (
        ("model.json", {"model_unreadable"}),
        ("teachers", {"model_unreadable"}),
        ("student", {"", "model_unreadable"}),
        ("", {""}),
    ):
        assert set(stage(decoded)["error_kind"].to_pylist()) == kinds, name
        down.discard(name)


@pytest.mark.parametrize("file", ["nut/student.safetensors", "screw/memory.safetensors", "teachers"])
def test_a_damaged_model_makes_only_its_own_rows_errors(run: Path, tmp_path: Path, file: str) -> None:
    shutil.copytree(run / "models", tmp_path / "models")
    folder, _, name = file.partition("/")
    (damaged,) = (tmp_path / "models" / folder).rglob(name or "*.safetensors")
    damaged.write_bytes(b"x")
    broken = set(CATEGORIES) if file == "teachers" else {folder}
    for row in scorer(tmp_path, accept_errors=True)(decode(manifest(run))).to_pylist():
        assert (row["error_kind"] == "model_damaged") == (row["category"] in broken)
        assert (row["score"] is None) == (row["category"] in broken)
        assert ("its SHA-256 is" in row["error_message"]) == (row["category"] in broken)


def test_a_category_that_is_fitted_again_keeps_the_model_that_its_run_began_with(run: Path, tmp_path: Path) -> None:
    store = ModelStore(str(run / "models"))
    model_ids = {name: record.model_id for name, record in current_models(store).items()}
    decoded = decode(manifest(run))
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    store, stage = ModelStore(str(tmp_path / "models")), scorer(tmp_path)
    before = stage(decoded.slice(0, 1))
    refit(run, tmp_path, seed=5)
    assert store.record("nut").model_id != model_ids["nut"]
    out = pa.concat_tables([before, stage(decoded.slice(1))]).to_pylist()
    assert {row["category"]: row["model_id"] for row in out} == model_ids
    assert {row["error_kind"] for row in out} == {""}


@pytest.fixture(params=["one batch after the other", "two in flight"])
def run_batches(request: pytest.FixtureRequest) -> Any:
    """Return what a scorer on a CPU and one on a GPU do with their batches."""
    return overlap if request.param == "two in flight" else chain.from_iterable


def test_a_batch_is_launched_while_the_host_finishes_the_one_before(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No features of a batch are left when the next one is launched, and no more than one detector is held for one."""
    decoded = decode(manifest(run))
    sequential = scorer(run, raw_maps=True, scoring_batch_size=6)(decoded)
    forward, score_inputs = Teacher.__call__, Detector.score_inputs
    events: list[str] = []
    features: list[StorageWeakRef] = []
    detectors: list[weakref.ref[Detector]] = []

    def launch(teacher: Teacher, inputs: Inputs) -> list[torch.Tensor]:
        gc.collect()
        events.append("launch")
        assert all(each.expired() for each in features)
        computed = forward(teacher, inputs)
        features.extend(StorageWeakRef(each.untyped_storage()) for each in computed)
        return computed

    def score(detector: Detector, *arguments: Any) -> Any:
        assert not [each for each in detectors if each() not in (None, detector)]
        detectors.append(weakref.ref(detector))
        name, decide = detector.record.category, score_inputs(detector, *arguments)

        def then() -> Any:
            events.append(f"decide {name}")
            finish = decide()
            return lambda: (events.append(f"finish {name}"), finish())[1]

        return then

    monkeypatch.setattr(Teacher, "__call__", launch)
    monkeypatch.setattr(Detector, "score_inputs", score)
    stage = scorer(run, raw_maps=True, scoring_batch_size=6, model_ram_gib=0.0)
    stage._run = overlap
    assert stage(decoded).equals(sequential)
    assert events == [
        *("launch", "decide grey"),
        *("launch", "decide grey", "finish grey", "decide nut"),
        *("launch", "decide nut", "finish grey", "finish nut", "decide screw"),
        *("launch", "finish nut", "finish screw", "decide screw", "finish screw"),
    ]


@pytest.mark.parametrize("size", [0, 2])
def test_a_forward_pass_that_fails_on_an_image_spoils_no_other(
    run: Path, run_batches: Any, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = decode(manifest(run))
    original = Teacher.inputs
    odd = np.frombuffer(decoded["pixels"][3].as_buffer(), np.uint8).reshape(64, 64, 3).copy()

    def inputs(teacher: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        if (pixels == torch.from_numpy(odd)).flatten(1).all(1).any():
            raise RuntimeError("no such kernel")
        return original(teacher, pixels)

    monkeypatch.setattr(Teacher, "inputs", inputs)
    stage = scorer(run, accept_errors=True, scoring_batch_size=size)
    stage._run = run_batches
    kinds = stage(decoded)["error_kind"].to_pylist()
    assert kinds == ["forward_failed" if i == 3 else "" for i in range(len(kinds))]


@pytest.mark.parametrize("fits", [0, 1, 3, 5])
def test_the_batch_size_is_halved_until_a_batch_fits(
    run: Path, fits: int, run_batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that does not fit alone is an error."""
    decoded = decode(manifest(run))
    expected = scorer(run)(decoded).to_pylist()
    original, tried = Teacher.compute, []

    def compute(teacher: Teacher, backbone: Any, inputs: torch.Tensor) -> list[torch.Tensor]:
        tried.append(len(inputs))
        if len(inputs) > fits:
            raise torch.cuda.OutOfMemoryError(f"{len(inputs)} images")
        return original(teacher, backbone, inputs)

    monkeypatch.setattr(Teacher, "compute", compute)
    stage = scorer(run, accept_errors=True)
    stage._run = run_batches
    out = stage(decoded).to_pylist()
    assert max(tried) > fits
    for row, other in zip(out, expected, strict=True):
        error = ("", "") if fits else ("out_of_memory", "OutOfMemoryError: 1 images")
        assert (row["error_kind"], row["error_message"]) == error
        assert row["score"] == (pytest.approx(other["score"], rel=1e-3) if fits else None)


def test_a_teacher_that_does_not_fit_beside_another_is_loaded_after_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refit(run, tmp_path, normalisation="none", epochs=1)
    rows = decode(manifest(tmp_path))
    expected = score(tmp_path, rows)
    original = Teacher.__init__
    made: list[weakref.ref[Teacher]] = []

    def make(teacher: Teacher, *arguments: Any) -> None:
        gc.collect()
        if any(other() for other in made):
            raise torch.cuda.OutOfMemoryError("out of memory")
        original(teacher, *arguments)
        made.append(weakref.ref(teacher))

    monkeypatch.setattr(Teacher, "__init__", make)
    assert score(tmp_path, rows).equals(expected)
    assert len(made) == 2


def test_a_model_in_bfloat16_is_scored_in_float32_where_that_is_not_native(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refit(run, tmp_path, precision="bfloat16", epochs=1)
    rows, in_float32 = decode(manifest(tmp_path)), score(tmp_path, manifest(tmp_path))
    found = {}
    for native in (True, False):
        capabilities = Capabilities(False, native, has_openvino=True)
        monkeypatch.setattr("stpm.method.device.device_capabilities", lambda device, found=capabilities: found)
        stage = scorer(tmp_path, raw_maps=True, overlays=True, arithmetic=Arithmetic(precision="bfloat16"))
        found[native] = stage(rows).equals(in_float32)
        assert ("device has no bfloat16" in caplog.text) != native
    assert found == {True: False, False: True}
