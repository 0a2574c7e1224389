"""The fit, the score and the evaluate job."""

import csv
import json
import socket
from pathlib import Path

import duckdb
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from stpm import __version__
from stpm.data.mvtec import read_category
from tests.cluster.conftest import TINY_RECIPE, call_job, read_rows, run_job
from tests.datasets import fitted_categories, make_category

pytestmark = pytest.mark.cluster

NO_MODELS = ("007", "a b", "../../a", "x" * 300, "__HIVE_DEFAULT_PARTITION__")


def test_fit_score_and_evaluate_with_relative_paths(working_folder: Path, ray_here: None) -> None:
    """The fit and the scoring run are processes."""
    make_category("data", "nut")
    make_category("data", "bolt")
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"http://127.0.0.1:{other.getsockname()[1]}"
        options = ["--data", "data", "--models", "models", "--categories", "nut", "--epochs", "2", *TINY_RECIPE]
        fitted = run_job("fit", *options, RAY_API_SERVER_ADDRESS=address)
        # Ray Train looks for its actors at no other cluster. It would wait for an answer, and might remove their group.
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.accept()
    assert fitted.returncode == 0
    assert "needs 99 good images to calibrate on: nut calibrates on 2 of its 8 good images, which" in fitted.stdout
    assert fitted_categories("models") == ["nut"]

    score = ["--models", "models", "--out", "run"]
    # A run without rows may be replaced.
    assert call_job("score", *score, "--images", "nothing", "--category", "nut").returncode == 3
    with Path("manifest.csv").open("w") as file:
        table = csv.writer(file)
        table.writerow(["uri", "category", "label", "mask", "line"])
        for image in read_category("data", "nut").test:
            table.writerow([image.uri, "nut", image.label, image.mask, 7])
        for number, category in enumerate(NO_MODELS):
            table.writerow([f"{number}.png", category, "", "", 8])
    scored = run_job("score", *score, "--images", "manifest.csv", "--raw-maps", "--export", "csv")
    assert scored.returncode == 2
    assert "no model for category '../../a'" in scored.stdout
    assert "5 of 13 images are errors, more than --max-error-rate 0.01: see error_kind in the rows" in scored.stdout
    # The first line is the job's own, and none is Ray's.
    for name, ran in (("fit", fitted), ("score", scored)):
        assert ran.stdout.startswith(f"{name} of stpm {__version__} starts\n")
        assert ran.stderr == ""
    rows = read_rows("run")
    found = [row for row in rows if not row["error_kind"]]
    assert all(Path("run", row["heatmap"]).is_file() for row in found)
    assert Path("run/triage.html").read_text().count("data:image/jpeg") == 8
    # Other programs read the rows of each category, whatever its name.
    counted = duckdb.execute("select category, count(*) from 'run/scores/*.parquet' group by category").fetchall()
    counts = dict.fromkeys(NO_MODELS, 1) | {"nut": 8}
    assert dict(counted) == counts
    frame, exported = pd.read_parquet("run/scores"), pd.read_csv("run/rows.csv")
    assert (frame.category == "nut").sum() == 8
    assert sorted(frame.uri) == sorted(exported.uri) == sorted(row["uri"] for row in rows)
    assert sorted(exported.line) == [7] * 8 + [8] * 5
    run = json.loads(Path("run/run.json").read_text())
    assert {name: category["rows"] for name, category in run["result"]["categories"].items()} == counts
    assert run["models"] == {"nut": found[0]["model_id"]}

    assert call_job("evaluate", "--run", "run", "--out", "report").returncode == 0
    nut = json.loads(Path("report/report.json").read_text())["categories"]["nut"]
    expected = roc_auc_score([row["label"] != "good" for row in found], [row["score"] for row in found])
    assert nut["image_auroc"] == pytest.approx(expected)
    assert nut["pixel_aupro"] is not None
