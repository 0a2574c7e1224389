import gc
import shutil
import weakref
from pathlib import Path

import pytest
import torch

from stpm.detector import Detector
from stpm.errors import ImageError
from stpm.method.arithmetic import Arithmetic
from stpm.method.teacher import Teacher
from stpm.models.store import Model, ModelStore
from stpm.scoring.stages.detector_cache import DetectorCache
from tests.conftest import record_calls
from tests.scoring.stages.helpers import CATEGORIES, current_models, refit


def make_cache(run: Path, max_bytes: int = 1) -> DetectorCache:
    store = ModelStore(str(run / "models"))
    arithmetic = Arithmetic(precision="bfloat16")
    return DetectorCache(store, current_models(store), torch.device("cpu"), arithmetic, max_bytes)


def test_detector_cache_keeps_models_used_last_within_its_budget(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = record_calls(monkeypatch, ModelStore, "load")
    total = sum(make_cache(run).detector(name).nbytes for name in CATEGORIES)
    total += make_cache(run).teacher("nut").nbytes
    for max_bytes, wanted, expected in (
        (2**30, "nut grey screw nut grey screw", "nut grey screw"),
        (1, "nut nut grey nut screw nut", "nut grey nut screw nut"),
        (total - 1, "nut grey screw grey nut", "nut grey screw nut"),
    ):
        loaded.clear()
        models = make_cache(run, max_bytes)
        for name in wanted.split():
            assert models.detector(name).record.category == name
        assert " ".join(name for _, name, _ in loaded) == expected


def test_a_teacher_is_built_once_and_dropped_with_the_last_model_that_uses_it(run: Path, tmp_path: Path) -> None:
    refit(run, tmp_path, precision="bfloat16", epochs=1)
    models = make_cache(tmp_path)
    in_use = models.teacher("nut")
    assert in_use.precision == "bfloat16"
    for name in ("nut", "grey"):
        models.detector(name)
    # A batch that is being scored may still use a teacher whose models were evicted.
    assert models.teacher("nut") is in_use
    dropped = weakref.ref(in_use)
    del in_use
    gc.collect()
    assert dropped() is None
    shared = weakref.ref(models.teacher("grey"))
    models.detector("screw")
    assert models.teacher("grey") is shared()


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, MemoryError])
def test_a_model_that_does_not_fit_beside_the_others_takes_their_place(
    run: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """One that does not fit alone is an error that is tried again."""
    models = make_cache(run, max_bytes=2**30)
    loaded = weakref.ref(models.detector("grey"))
    original = Detector.from_model

    def from_model(model: Model, teacher: Teacher) -> Detector:
        gc.collect()
        if loaded() or model.record.category == "screw":
            raise error("out of memory")
        return original(model, teacher)

    monkeypatch.setattr(Detector, "from_model", from_model)
    assert models.detector("nut").record.category == "nut"
    with pytest.raises(ImageError, match=rf"^no memory for the model of screw: {error.__name__}: out of mem") as caught:
        models.detector("screw")
    assert caught.value.kind == "out_of_memory"


def test_a_failed_load_is_not_tried_again_at_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    models = make_cache(tmp_path)
    shutil.rmtree(tmp_path / "models" / "nut")
    asked = record_calls(monkeypatch, ModelStore, "load")
    for _ in range(2):
        with pytest.raises(ImageError, match="no model nut-") as caught:
            models.detector("nut")
        assert caught.value.kind == "model_damaged"
    assert len(asked) == 1
