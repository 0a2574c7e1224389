"""The evaluate job: the report of a scored collection, and the gate."""

import csv
import json
from pathlib import Path

import duckdb
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from stpm.data.mvtec import read_category
from tests.cluster.conftest import call_job, fit, read_rows
from tests.datasets import make_category

pytestmark = pytest.mark.cluster


NO_MODELS = ("007", "a b", "../../a", "x" * 300, "__HIVE_DEFAULT_PARTITION__")


def check_rows() -> None:
    """Other programs read the rows of each category, whatever its name."""
    found = duckdb.execute(
        "select category, count(*), min(error_message) from 'run/scores/*.parquet' group by category order by category"
    ).fetchall()
    counts = dict.fromkeys(NO_MODELS, 1) | {"nut": 8}
    assert {category: count for category, count, _ in found} == counts
    assert "no model for category '../../a'" in found[0][2]
    frame = pd.read_parquet("run/scores")
    assert (frame.category == "nut").sum() == 8
    assert sorted(frame.uri) == sorted(row["uri"] for row in read_rows("run"))
    result = json.loads(Path("run/run.json").read_text())["result"]
    assert result["rows"] == 13
    assert {name: category["rows"] for name, category in result["categories"].items()} == counts


@pytest.mark.filterwarnings("ignore:Using `min_rows_per_file` with non-empty:DeprecationWarning")
def test_a_scored_collection_with_labels_is_evaluated_and_compared(working_folder: Path, ray_here: None) -> None:
    make_category("data", "nut")
    fit("data", "models")
    with Path("manifest.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerow(["uri", "category", "label", "mask", "line"])
        for image in read_category(str(working_folder / "data"), "nut").test:
            rows.writerow([image.uri, "nut", image.label, image.mask, 7])
        for number, category in enumerate(NO_MODELS):
            rows.writerow([working_folder / f"{number}.png", category, "", "", 8])
    score = ["--models", "models", "--images", "manifest.csv", "--out", "run", "--raw-maps"]
    score += ["--max-error-rate", "1", "--export", "csv"]
    assert call_job("score", *score).returncode == 0
    check_rows()
    exported = pd.read_csv("run/rows.csv")
    assert sorted(exported.uri) == sorted(row["uri"] for row in read_rows("run"))
    assert sorted(exported.line) == [7] * 8 + [8] * 5

    done = call_job("evaluate", "--run", "run", "--out", "report", "--export", "csv")
    assert done.returncode == 0
    report = json.loads(Path("report/report.json").read_text())
    scored = [row for row in read_rows("run") if not row["error_kind"]]
    expected = roc_auc_score([row["label"] != "good" for row in scored], [row["score"] for row in scored])
    nut = report["categories"]["nut"]
    assert nut["image_auroc"] == pytest.approx(expected)
    assert nut["pixel_aupro"] is not None
    assert {path.name for path in Path("report").iterdir()} == {
        "defects.csv",
        "defects.parquet",
        "report.csv",
        "report.html",
        "report.json",
        "report.md",
        "report.parquet",
        "rows-scores.csv",
    }

    # At the masks' own size, and compared to the first report.
    gate = ["--baseline", "report/report.json", "--require", "mean.image_auroc=1.0,nut.image_recall=0.0"]
    other = call_job("evaluate", "--run", "run", "--out", "other", "--masks-at", "original", *gate)
    assert other.returncode == 2
    assert "the baseline's mask_resolution is" in other.stdout
    assert ("falls short: mean.image_auroc" in other.stdout) == (expected < 1)
    assert "Falls short" in Path("other/report.html").read_text()
    assert json.loads(Path("other/report.json").read_text())["categories"]["nut"]["image_auroc"] == nut["image_auroc"]
