"""The benchmark job on a small data set with every kind of fault in it, and the files that it writes."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stpm.models.store import ModelStore
from stpm.scoring.schema import OUTPUT
from tests.cluster.conftest import TINY_RECIPE, call_job
from tests.datasets import encode_image, fitted_categories, make_category

pytestmark = pytest.mark.cluster

SEEDS = (0, 1)
MARKUP = "<img src=x onerror=alert(1)>"
OPTIONS = ["--epochs", "3", "--seeds", "0,1", *TINY_RECIPE]
FITTED = ("colour", "grey", "mismatch", "odd")


@dataclass(frozen=True)
class Finished:
    data: Path
    out: Path
    process: subprocess.CompletedProcess[str]

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "report.json").read_text())
        return found

    def rows(self, seed: int, category: str = "") -> list[dict[str, Any]]:
        files = list((self.out / "scores").glob(f"seed-{seed}_*.parquet"))
        found: list[dict[str, Any]] = ds.dataset(files).to_table().to_pylist()
        return [row for row in found if category in ("", row["category"])]

    def store(self, seed: int) -> ModelStore:
        return ModelStore(str(self.out / "models" / f"seed-{seed}"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Finished:
    root = tmp_path_factory.mktemp("benchmark")
    data, out = root / "data", root / "out"
    make_category(str(data), "colour")
    make_category(str(data), "grey", masks=False, grey=True, kind="JPEG")
    make_category(str(data), "odd", train=6)
    test = data / "odd" / "test" / "good"
    (test / "dot.png").write_bytes(encode_image(np.full((1, 1, 3), 100, np.uint8)))
    (test / "deep.png").write_bytes(encode_image(np.full((48, 40), 28_000, np.uint16)))
    jpeg = encode_image(np.full((48, 40, 3), 100, np.uint8), "JPEG")
    (test / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    make_category(str(data), "broken")
    (data / "broken" / "train" / "good" / "003.png").write_bytes(b"not an image")
    make_category(str(data), "mismatch")
    mask = encode_image(np.zeros((9, 9), np.uint8))
    (data / "mismatch" / "ground_truth" / "square" / "001_mask.png").write_bytes(mask)
    (data / "hollow").mkdir()
    make_category(str(data), MARKUP)
    (data / "license.txt").write_text("not a category")
    where = ["--data", str(data), "--out", str(out), "--track", f"file://{root}/mlruns"]
    return Finished(data, out, call_job("benchmark", *where, *OPTIONS))


def test_the_report_and_the_log_name_each_failure(run: Finished) -> None:
    assert run.process.returncode == 2
    assert "Traceback" not in run.process.stdout + run.process.stderr
    failures = {(f["category"].split(" (seed")[0], f["reason"]) for f in run.report["failures"]}
    named = {
        "hollow": str(run.data / "hollow"),
        MARKUP: "holds the character '<'",
        "broken": str(run.data / "broken/train/good/003.png"),
        "odd": str(run.data / "odd/test/good/cut.jpg"),
        "mismatch": str(run.data / "mismatch/ground_truth/square/001_mask.png"),
    }
    assert {category for category, _ in failures} == set(named)
    for category, path in named.items():
        assert all(path in reason for name, reason in failures if name == category)
        assert path in run.process.stdout


def test_each_model_is_stored_and_scores_its_rows(run: Finished) -> None:
    for seed in SEEDS:
        store = run.store(seed)
        assert tuple(fitted_categories(store.uri)) == FITTED
        for category in FITTED:
            record = store.load(category).record
            assert store.history(record).num_rows == 3
            assert f"{category} (seed {seed})" in run.process.stdout
            assert {row["model_id"] for row in run.rows(seed, category)} - {""} == {record.model_id}
    assert not (run.out / "models" / "seed-0" / ".train").exists()


def test_each_model_and_the_report_are_runs_in_mlflow(run: Finished) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"file://{run.data.parent}/mlruns")
    logged = client.search_runs([client.get_experiment_by_name("data").experiment_id])
    assert sorted(each.info.run_name for each in logged) == sorted(
        ["report", *(f"{category} (seed {seed})" for category in FITTED for seed in SEEDS)]
    )
    for each in logged:
        seed, category = each.data.params.get("seed"), each.data.tags.get("category")
        assert each.data.tags.get("model_id") == (run.store(int(seed)).record(category).model_id if seed else None)


def test_every_test_image_has_one_row_and_a_heatmap_per_seed(run: Finished) -> None:
    images = {str(path) for category in FITTED for path in (run.data / category / "test").rglob("*.*")}
    written = pq.read_schema(next((run.out / "scores").glob("*.parquet")))
    assert (written.names, written.types) == (OUTPUT.names, OUTPUT.types)
    assert all(field.metadata[b"description"] for field in written)
    for seed in SEEDS:
        rows = run.rows(seed)
        assert sorted(row["uri"] for row in rows) == sorted(images)
        (error,) = (row for row in rows if row["error_kind"])
        assert (Path(error["uri"]).name, error["error_kind"], error["score"]) == ("cut.jpg", "damaged", None)
        for row in rows:
            if row != error:
                with Image.open(run.out / row["heatmap"]) as image:
                    assert image.size == (64, 64)


def test_a_second_run_fits_nothing_and_gets_the_same_metrics(run: Finished) -> None:
    before = run.report["categories"]
    some = ["--data", str(run.data), "--out", str(run.out), "--categories", "colour,grey"]
    again = call_job("benchmark", *some, *OPTIONS)
    assert again.returncode == 0
    assert again.stdout.count("is there already") == 4
    assert "epoch" not in again.stdout
    after = run.report["categories"]
    assert set(after) == {"colour", "grey"}
    for category, values in after.items():
        for metric in ("image_auroc", "pixel_auroc"):
            assert values[metric] == pytest.approx(before[category][metric])
    assert len(run.rows(0) + run.rows(1)) == 2 * 2 * 8
