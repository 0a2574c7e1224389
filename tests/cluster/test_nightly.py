"""The nightly job in processes of its own: two starts at once, a kill in the middle, late files, a webhook."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

import stpm
from stpm import storage
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import open_rows
from tests.cluster.conftest import (
    fit,
    kill_tree,
    make_images,
    start_job,
    start_twice,
    wait_for_success,
    wait_until,
    written_tasks,
)
from tests.datasets import make_category
from tests.line.test_webhook import Server

pytestmark = pytest.mark.cluster

IMAGES = 400
NIGHT = "2026-11-24"
URL_SECRET, KEY = "a-path-that-no-log-may-show", "a-key-that-no-log-may-show"


def rows(out: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of the night by URI, sorted; each image has one."""
    outputs = RunOutput.all_named(f"{out}/date={NIGHT}")
    found = [row for output in outputs for row in open_rows(output).to_table().to_pylist()]
    by_uri = {row["uri"]: row for row in sorted(found, key=lambda row: row["uri"])}
    assert len(by_uri) == len(found)
    return by_uri


def test_a_killed_night_with_late_files_has_the_rows_of_an_undisturbed_one(tmp_path: Path) -> None:
    make_category(str(tmp_path / "data"), "nut")
    fit(tmp_path / "data", tmp_path / "models")
    images = tmp_path / "dump" / NIGHT
    make_images(str(images), IMAGES, broken=range(0, IMAGES, 50))
    out = tmp_path / "nights"
    options = ["--models", str(tmp_path / "models"), "--images", f"{tmp_path}/dump/{{date}}", "--date", NIGHT]
    options += ["--category", "nut", "--rows-per-file", "32", "--scoring-batch-size", "4", "--max-error-rate", "1"]
    options += ["--scorers", "1", "--settle", "0"]
    late = storage.files(str(images))[7:20]
    (tmp_path / "late").mkdir()
    for uri in late:
        Path(uri).rename(tmp_path / "late" / Path(uri).name)
    options += ["--out", str(out)]
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    secrets = {"STPM_WEBHOOK": f"http://127.0.0.1:{server.server_port}/{URL_SECRET}", "STPM_WEBHOOK_SECRET": KEY}

    # Of two starts at once, one works, and is killed.
    winner = start_twice(out, 0, "nightly", *options, **secrets)
    run = RunOutput.named(f"{out}/date={NIGHT}", "001")
    wait_until(lambda: bool(written_tasks(run)), "no rows were written")
    kill_tree(winner)
    assert not (out / "nightly.html").exists()

    for uri in late:
        (tmp_path / "late" / Path(uri).name).rename(uri)
    log = wait_for_success(start_job("nightly", *options, **secrets))
    assert "are scored already" in log
    found = rows(out)
    assert [*found] == storage.files(str(images))
    detector = stpm.load(str(tmp_path / "models"), "nut")
    for number, (uri, row) in enumerate(found.items()):
        assert (not row["error_kind"], row["category"]) == (number % 50 > 0, "nut")
        if number % 50 == 1:
            expected = detector.score(uri)
            assert row["score"] == pytest.approx(expected.score, rel=1e-3)
            assert row["is_anomalous"] == expected.is_anomalous
    assert len(open_rows(RunOutput.named(f"{out}/date={NIGHT}", "002")).to_table()) == len(late)
    (night,) = json.loads((out / "nightly.json").read_text())["nights"]
    assert night["images"] == IMAGES
    assert night["categories"]["nut"]["alarms"] == sum(bool(row["is_anomalous"]) for row in found.values())

    assert [json.loads(body)["images"] for _, _, body in server.received] == [IMAGES]
    server.shutdown()
    written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    for secret in (URL_SECRET, KEY):
        assert secret not in log
        assert secret.encode() not in written
