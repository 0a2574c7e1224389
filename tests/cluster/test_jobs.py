"""The fit and the score job, and their errors for input that is not valid."""

import json
import socket
from importlib.util import find_spec
from pathlib import Path

import pytest

from stpm import __version__
from tests.cluster.conftest import TINY_RECIPE, call_job, read_rows, run_job
from tests.datasets import fitted_categories, make_category

pytestmark = pytest.mark.cluster

TINY_FIT = ["--epochs", "2", *TINY_RECIPE]
SCORE = ["--models", "models", "--category", "nut"]


def written() -> dict[str, int]:
    """Return when each file of the run folder was written, in nanoseconds."""
    found = (path for path in Path("run").rglob("*") if path.is_file() and path.parent.name != ".lease")
    return {str(path.relative_to("run")): path.stat().st_mtime_ns for path in found}


def check_again(images: list[str]) -> None:
    """Check that the same options do nothing, and that others change what depends on them, or are refused."""
    before = written()
    again = call_job("score", *SCORE, *images)
    assert again.returncode == 0
    assert "all images of this run are scored already" in again.stdout
    assert written() == before
    shorter = call_job("score", *SCORE, *images, "--top", "3")
    assert shorter.returncode == 0
    assert Path("run/triage.html").read_text().count("data:image/jpeg") == 3
    assert {path for path, time in written().items() if time != before[path]} == {"triage.html", "run.json"}
    other = call_job("score", *SCORE, *images, "--heatmaps", "none")
    assert other.returncode == 1
    assert "heatmaps was 'all' and is 'none'" in other.stderr


def check_fresh(images: list[str]) -> None:
    """Score from the start, with an empty file among the images."""
    Path("data/nut/test/good/zero.png").write_bytes(b"")
    some = call_job("score", *SCORE, *images, "--fresh", "--heatmaps", "none", "--raw-maps")
    assert some.returncode == 2
    assert "zero.png: empty: the file has no bytes" in some.stdout
    rows = read_rows("run")
    assert len(rows) == 9
    assert all(row["heatmap"] == "" for row in rows)
    assert sum(row["anomaly_map"] is not None for row in rows) == 8
    assert not list(Path("run/heatmaps").rglob("*.png"))


def check_feedback() -> None:
    """Add a marked image to the models here, and list them."""
    Path("marks.csv").write_text("uri,category,label\ndata/nut/test/good/000.png,nut,good\n")
    feedback = call_job("fit", "--models", "models", "--add-good", "marks.csv")
    assert feedback.returncode == 0
    assert "1 of 1 images that are marked as good belong to models in models" in feedback.stdout
    listed = call_job("models", "--models", "models")
    assert listed.returncode == 0
    assert [place in listed.stdout for place in (" current ", " 1 before ", " 2 before ")] == [True, True, False]


def test_fit_then_score_with_relative_paths(working_folder: Path, ray_here: None) -> None:
    """The first fit and the first scoring run are processes; what follows checks what they left."""
    make_category("data", "nut")
    make_category("data", "bolt")
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"http://127.0.0.1:{other.getsockname()[1]}"
        options = ["--data", "data", "--models", "models", "--categories", "nut", *TINY_FIT]
        fit = run_job("fit", *options, RAY_API_SERVER_ADDRESS=address)
        # Ray Train looks for its actors at no other cluster. It would wait for an answer, and might remove their group.
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.accept()
    assert fit.returncode == 0
    assert "needs 99 good images to calibrate on: nut calibrates on 2 of its 8 good images, which" in fit.stdout
    assert fitted_categories("models") == ["nut"]

    # A run without rows may be replaced.
    assert call_job("score", *SCORE, "--images", "nothing", "--out", "run").returncode == 3
    images = ["--images", "data/nut/test", "--out", "run"]
    score = run_job("score", *SCORE, *images)
    assert score.returncode == 0
    # The first line is the job's own, and none is Ray's.
    for name, ran in (("fit", fit), ("score", score)):
        assert ran.stdout.startswith(f"{name} of stpm {__version__} starts\n")
        assert ran.stderr == ""
    assert "nut calibrates on 2 of its 8 good images, which supports a rate of 0.333 or more" in score.stdout
    rows = read_rows("run")
    assert len(rows) == 8
    assert all(Path("run", row["heatmap"]).exists() and row["anomaly_map"] is None for row in rows)
    assert Path("run/triage.html").read_text().count("data:image/jpeg") == 8
    run = json.loads(Path("run/run.json").read_text())
    assert run["result"]["rows"] == 8
    assert 0 < run["result"]["statistics"]["score_seconds"] < 2 * run["result"]["seconds"]
    assert run["result"]["statistics"]["openvino_images"] == (8 if find_spec("openvino") else 0)
    assert run["result"]["bytes_read"] == sum(path.stat().st_size for path in Path("data/nut/test").rglob("*.png"))
    assert run["models"] == {"nut": rows[0]["model_id"]}
    names = {path.name for path in Path("run").iterdir()}
    assert names == {".lease", "_SUCCESS", "heatmaps", "manifest", "run.json", "scores", "summaries", "triage.html"}

    check_again(images)
    assert read_rows("run") == rows

    check_fresh(images)
    check_feedback()

    refused = call_job("fit", *options, "--categories", "bolt", "--cpus-per-worker", "99")
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert "do not fit the cluster" in line
    assert fitted_categories("models") == ["nut"]
