"""Data and output in object storage: a real S3 server, real requests."""

from __future__ import annotations

import json

import pytest

from stpm import storage
from stpm.models.store import ModelStore
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import open_rows
from tests.cluster.conftest import TINY_RECIPE, run_job
from tests.datasets import make_category

pytestmark = pytest.mark.cluster


def test_a_fit_reads_from_s3_and_writes_to_s3(s3: dict[str, str]) -> None:
    data, models = "s3://bucket/fit/data", "s3://bucket/fit/models"
    make_category(data, "nut")
    options = ["--data", data, "--models", models, "--epochs", "3", "--checkpoint-seconds", "0", *TINY_RECIPE]
    assert run_job("fit", *options).returncode == 0
    first = storage.files(f"{models}/nut"), storage.read(f"{models}/nut/current.json")
    again = run_job("fit", *options)
    assert again.returncode == 0
    assert "is there already" in again.stdout
    assert (storage.files(f"{models}/nut"), storage.read(f"{models}/nut/current.json")) == first
    # An image written again has the same version with the same bytes, and another with other bytes of the same length.
    uri = f"{data}/nut/train/good/000.png"
    before = storage.file_versions(f"{data}/nut")
    storage.publish(uri, storage.read(uri))
    assert storage.file_versions(f"{data}/nut") == before
    storage.publish(uri, storage.read(uri)[:-1] + b"x")
    assert [one for one, other in zip(storage.file_versions(f"{data}/nut"), before, strict=True) if one != other] == [
        (uri, dict(storage.file_versions(f"{data}/nut"))[uri])
    ]
    assert not [uri for uri in storage.files(models) if "checkpoint" in uri or ".train" in uri]


def test_a_benchmark_reads_from_s3_and_writes_to_s3(s3: dict[str, str]) -> None:
    data, out = "s3://bucket/data sets/one", "s3a://bucket/runs/a"
    make_category(data, "nut")
    make_category(data, "grey", grey=True, kind="JPEG")
    process = run_job("benchmark", "--data", data, "--out", out, "--epochs", "2", *TINY_RECIPE)
    assert process.returncode == 0

    report = json.loads(storage.read(f"{out}/report.json"))
    assert set(report["categories"]) == {"nut", "grey"}
    assert all(values["pixel_auroc"] is not None for values in report["categories"].values())
    assert ModelStore(f"{out}/models/seed-0").load("nut").record.category == "nut"
    rows = open_rows(RunOutput.named(out, "seed-0")).to_table().to_pylist()
    rows = [row for row in rows if row["category"] == "nut"]
    assert len(rows) == 8
    assert all(row["uri"].startswith(f"{data}/nut/test/") for row in rows)
    assert all(storage.read(f"{out}/{row['heatmap']}").startswith(b"\x89PNG") for row in rows)
    assert not [uri for uri in storage.files(f"{out}/models") if ".train" in uri]

    written = b"".join(storage.read(uri) for uri in storage.files(out) if uri.endswith((".json", ".parquet")))
    options = ["--models", f"{out}/models/seed-0", "--category", "nut"]
    for images, run in ((f"{data}/nut/test", "s3://nobucket/run"), ("s3://nobucket/images", f"{out}/other")):
        no_bucket = run_job("score", *options, "--images", images, "--out", run)
        assert no_bucket.returncode == 1
        assert len(no_bucket.stderr.splitlines()) == 1
        assert "s3://nobucket/" in no_bucket.stderr

    for secret in (s3["AWS_ACCESS_KEY_ID"], s3["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in process.stdout + process.stderr
        assert secret.encode() not in written
