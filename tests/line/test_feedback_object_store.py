"""Feedback where images, table and models are in an object store."""

from __future__ import annotations

from stpm import storage
from stpm.fitting.options import FitOptions, WorkerOptions
from stpm.jobs.fit import run_fit
from stpm.jobs.models import run_models
from stpm.method.recipe import Recipe
from stpm.models.options import ModelsOptions
from stpm.models.store import ModelStore
from stpm.options import ClusterOptions, Names
from tests.datasets import make_category


def test_feedback_and_roll_back_in_an_object_store(memory: str, tiny: Recipe, fitted_keys: list[str]) -> None:
    data, models = f"{memory}/data", f"{memory}/models"
    make_category(data, "nut", good=2)
    cluster = ClusterOptions(backend="pytorch")
    assert run_fit(FitOptions(data, models), tiny, WorkerOptions(), cluster) == 0
    store = ModelStore(models)
    before = store.record("nut")
    lines = "".join(
        f'{{"uri": "{data}/nut/test/good/00{i}.png", "category": "nut", "label": "good"}}\n' for i in (0, 1)
    )
    storage.publish(f"{memory}/marks.jsonl", lines.encode())
    for options in (FitOptions("", models, add_good=f"{memory}/marks.jsonl"), FitOptions(data, models)):
        assert run_fit(options, tiny, WorkerOptions(), cluster) == 0
        assert len(store.record("nut").added_images) == 2
    assert len(fitted_keys) == 1
    assert store.load("nut").record.good_count == before.good_count + 2
    assert run_models(ModelsOptions(models, Names(["nut"]), roll_back=True)) == 0
    assert store.record("nut") == before
