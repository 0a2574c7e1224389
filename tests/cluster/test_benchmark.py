"""The benchmark job on a small data set with every kind of fault in it, and the files that it writes."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from stpm.models.store import ModelStore
from stpm.scoring.schema import OUTPUT
from tests.cluster.conftest import TINY_RECIPE, run_job
from tests.datasets import encode_image, fitted_categories, make_category

pytestmark = pytest.mark.cluster

SEEDS = (0, 1)
MARKUP = "<img src=x onerror=alert(1)>"
OPTIONS = ["--epochs", "3", "--seeds", "0,1", *TINY_RECIPE]


@dataclass(frozen=True)
class Finished:
    data: Path
    out: Path
    process: subprocess.CompletedProcess[str]

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "report.json").read_text())
        return found

    @property
    def rows(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = ds.dataset(self.out / "scores").to_table().to_pylist()
        return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    root = tmp_path_factory.mktemp("benchmark")
    data = root / "data"
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
    (data / "mismatch" / "ground_truth" / "square" / "001_mask.png").write_bytes(
        encode_image(np.zeros((9, 9), np.uint8))
    )
    (data / "hollow").mkdir()
    make_category(str(data), MARKUP)
    (data / "license.txt").write_text("not a category")
    out = root / "out"
    return Finished(data, out, run_job("benchmark", "--data", str(data), "--out", str(out), *OPTIONS))


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


def test_both_losses_of_every_epoch_are_logged(run: Finished) -> None:
    for seed in SEEDS:
        store = ModelStore(str(run.out / "models" / f"seed-{seed}"))
        for category in fitted_categories(store.uri):
            lines = [line for line in run.process.stdout.splitlines() if line.startswith(f"{category} (seed {seed})")]
            for kind in ("train", "validation"):
                logged = re.findall(rf"{kind} loss ((?:\d\.\d+ )+)", "\n".join(lines))
                stored = store.history(store.record(category))[f"{kind}_loss"].to_pylist()
                assert " ".join(logged).split() == [f"{loss:.4f}" for loss in stored]


def test_every_test_image_has_one_row_per_seed(run: Finished) -> None:
    images = {
        str(path)
        for category in ("colour", "grey", "odd", "mismatch")
        for path in (run.data / category / "test").rglob("*.*")
    }
    for seed in SEEDS:
        paths = list((run.out / "scores").glob(f"seed-{seed}_*.parquet"))
        assert paths
        assert sorted(ds.dataset(paths).to_table()["uri"].to_pylist()) == sorted(images)
    errors = [row for row in run.rows if row["error_kind"]]
    assert {(row["uri"].rsplit("/", 1)[-1], row["error_kind"]) for row in errors} == {("cut.jpg", "damaged")}
    assert all(row["score"] is None for row in errors)


def test_the_schema_is_written_with_its_descriptions(run: Finished) -> None:
    written = pq.read_schema(next((run.out / "scores").glob("*.parquet")))
    assert written.names == OUTPUT.names
    assert written.types == OUTPUT.types
    assert all(field.metadata[b"description"] for field in written)


def test_duckdb_and_pandas_find_the_most_anomalous_images_of_each_category(run: Finished) -> None:
    expected = {}
    for category in ("colour", "grey", "odd", "mismatch"):
        rows = [
            row for row in run.rows if row["category"] == category and row["seed"] == 0 and row["score"] is not None
        ]
        expected[category] = [row["uri"] for row in sorted(rows, key=lambda row: -row["score"])[:3]]
    files = str(run.out / "scores" / "seed-0_*.parquet")
    query = (
        "select category, uri from read_parquet(?) where error_kind = '' "
        "qualify row_number() over (partition by category order by score desc) <= 3 order by score desc"
    )
    found: dict[str, list[str]] = {}
    for category, uri in duckdb.execute(query, [files]).fetchall():
        found.setdefault(category, []).append(uri)
    assert found == expected
    frame = pd.concat([pd.read_parquet(path) for path in sorted((run.out / "scores").glob("seed-0_*.parquet"))])
    top = frame[frame.error_kind == ""].sort_values("score", ascending=False).groupby("category").head(3)
    assert {name: group.uri.tolist() for name, group in top.groupby("category")} == expected


def test_metrics_in_the_report_agree_with_the_rows(run: Finished) -> None:
    for category in ("colour", "grey", "odd", "mismatch"):
        for seed in SEEDS:
            rows = [r for r in run.rows if r["category"] == category and r["seed"] == seed]
            labels = [row["label"] != "good" for row in rows]
            expected = roc_auc_score(labels, [row["score"] for row in rows])
            found = run.report["categories"][category]["seeds"][str(seed)]
            assert found["image_auroc"] == pytest.approx(expected)
    categories = run.report["categories"]
    assert categories["colour"]["pixel_auroc"] is not None
    assert categories["grey"]["undefined"]["pixel_auroc"] == "no masks"
    assert "9×9" in categories["mismatch"]["undefined"]["pixel_auroc"]
    assert run.report["mean"]["image_auroc"] == pytest.approx(np.mean([c["image_auroc"] for c in categories.values()]))
    table = pq.read_table(run.out / "report.parquet").to_pylist()
    assert len(table) == len(categories) * len(SEEDS)
    assert all(row["fit_seconds"] > 0 and row["train_loss"] > 0 for row in table)


def test_the_report_is_also_written_as_html_markdown_and_a_table_of_defects(run: Finished) -> None:
    page = (run.out / "report.html").read_text()
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert MARKUP not in page
    assert page.count("<svg") == 3 * 4
    lines = (run.out / "report.md").read_text().splitlines()
    assert sum(line.startswith(("| colour", "| grey", "| odd", "| mismatch", "| mean")) for line in lines) == 5
    types = pq.read_table(run.out / "defects.parquet").to_pylist()
    assert {(row["category"], row["defect"]) for row in types} == {
        (name, "square") for name in ("colour", "grey", "odd", "mismatch")
    }


def test_heatmaps_galleries_and_models_are_written(run: Finished) -> None:
    for row in run.rows:
        if not row["error_kind"]:
            with Image.open(run.out / row["heatmap"]) as image:
                assert image.size == (64, 64)
    for seed in SEEDS:
        with Image.open(run.out / "gallery" / f"seed-{seed}" / "colour.png") as image:
            assert image.width > 1000
        store = ModelStore(str(run.out / "models" / f"seed-{seed}"))
        assert fitted_categories(store.uri) == ["colour", "grey", "mismatch", "odd"]
        for category in fitted_categories(store.uri):
            model = store.load(category)
            assert store.history(model.record).num_rows == 3
            assert {r["model_id"] for r in run.rows if r["category"] == category and r["seed"] == seed} - {""} == {
                model.record.model_id
            }
    assert not (run.out / "models" / "seed-0" / ".train").exists()


def test_a_second_run_fits_nothing_and_gets_the_same_metrics(run: Finished) -> None:
    before = run.report["categories"]
    again = run_job(
        "benchmark", "--data", str(run.data), "--out", str(run.out), "--categories", "colour,grey", *OPTIONS
    )
    assert again.returncode == 0
    assert again.stdout.count("is there already") == 4
    assert "epoch" not in again.stdout
    after = run.report["categories"]
    assert set(after) == {"colour", "grey"}
    for category, values in after.items():
        for metric in ("image_auroc", "pixel_auroc"):
            assert values[metric] == pytest.approx(before[category][metric])
    assert len(run.rows) == 2 * 2 * 8
