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
from tests.cluster.conftest import TINY_RECIPE, call_job, fit, read_rows, run_job
from tests.datasets import fitted_categories, make_category

pytestmark = pytest.mark.cluster

TINY_FIT = ["--epochs", "2", *TINY_RECIPE]
SCORE = ["--models", "models", "--category", "nut"]
RUN = ["--out", "run"]


NO_MODELS = ("007", "a b", "../../a", "x" * 300, "__HIVE_DEFAULT_PARTITION__")


def test_fit_then_score_with_relative_paths(working_folder: Path, ray_here: None) -> None:
    """The first fit and the first scoring run are processes; what follows checks what they left."""
    make_category("data", "nut")
    make_category("data", "bolt")
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"http://127.0.0.1:{other.getsockname()[1]}"
        options = ["--data", "data", "--models", "models", "--categories", "nut", *TINY_FIT]
        fitted = run_job("fit", *options, RAY_API_SERVER_ADDRESS=address)
        # Ray Train looks for its actors at no other cluster. It would wait for an answer, and might remove their group.
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.accept()
    assert fitted.returncode == 0
    assert "needs 99 good images to calibrate on: nut calibrates on 2 of its 8 good images, which" in fitted.stdout
    assert fitted_categories("models") == ["nut"]

    # A run without rows may be replaced.
    assert call_job("score", *SCORE, "--images", "nothing", *RUN).returncode == 3
    score = run_job("score", *SCORE, "--images", "data/nut/test", *RUN)
    assert score.returncode == 0
    # The first line is the job's own, and none is Ray's.
    for name, ran in (("fit", fitted), ("score", score)):
        assert ran.stdout.startswith(f"{name} of stpm {__version__} starts\n")
        assert ran.stderr == ""
    rows = read_rows("run")
    assert len(rows) == 8
    assert all(Path("run", row["heatmap"]).exists() and row["anomaly_map"] is None for row in rows)
    assert Path("run/triage.html").read_text().count("data:image/jpeg") == 8
    run = json.loads(Path("run/run.json").read_text())
    assert run["result"]["rows"] == 8
    assert run["models"] == {"nut": rows[0]["model_id"]}


@pytest.mark.filterwarnings("ignore:Using `min_rows_per_file` with non-empty:DeprecationWarning")
def test_a_scored_collection_with_labels_is_evaluated(working_folder: Path, ray_here: None) -> None:
    make_category("data", "nut")
    fit("data", "models")
    with Path("manifest.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerow(["uri", "category", "label", "mask", "line"])
        for image in read_category(str(working_folder / "data"), "nut").test:
            rows.writerow([image.uri, "nut", image.label, image.mask, 7])
        for number, category in enumerate(NO_MODELS):
            rows.writerow([working_folder / f"{number}.png", category, "", "", 8])
    scored = call_job("score", "--models", "models", "--images", "manifest.csv", *RUN, "--raw-maps", "--export", "csv")
    assert scored.returncode == 2
    assert "5 of 13 images are errors, more than --max-error-rate 0.01: see error_kind in the rows" in scored.stdout
    # Other programs read the rows of each category, whatever its name.
    counted = duckdb.execute("select category, count(*) from 'run/scores/*.parquet' group by category").fetchall()
    counts = dict.fromkeys(NO_MODELS, 1) | {"nut": 8}
    assert dict(counted) == counts
    frame = pd.read_parquet("run/scores")
    assert (frame.category == "nut").sum() == 8
    assert sorted(frame.uri) == sorted(row["uri"] for row in read_rows("run"))
    result = json.loads(Path("run/run.json").read_text())["result"]
    assert {name: category["rows"] for name, category in result["categories"].items()} == counts
    exported = pd.read_csv("run/rows.csv")
    assert sorted(exported.uri) == sorted(frame.uri)
    assert sorted(exported.line) == [7] * 8 + [8] * 5

    assert call_job("evaluate", "--run", "run", "--out", "report").returncode == 0
    nut = json.loads(Path("report/report.json").read_text())["categories"]["nut"]
    found = [row for row in read_rows("run") if not row["error_kind"]]
    expected = roc_auc_score([row["label"] != "good" for row in found], [row["score"] for row in found])
    assert nut["image_auroc"] == pytest.approx(expected)
    assert nut["pixel_aupro"] is not None
