"""Data and output in object storage: a real S3 server, real requests."""

import io
import json
import os
import tarfile
from typing import Any

import pytest
from s3fs import S3FileSystem

from stpm import storage
from stpm.data import image_files
from stpm.data.image_files import ImageRef
from stpm.models.store import ModelStore
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.sources import image_rows
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import open_rows
from tests.cluster.conftest import TINY_RECIPE, call_job, run_job
from tests.datasets import make_category, make_output

pytestmark = pytest.mark.cluster


def test_of_an_archive_only_headers_are_read_and_a_picture_by_its_position(
    s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    size, count = 2 * 2**20, 20
    content, noise = io.BytesIO(), os.urandom(size)
    with tarfile.open(fileobj=content, mode="w") as archive:
        for number in range(count):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = size
            archive.addfile(member, io.BytesIO(noise))
    uri = "s3://bucket/large.tar"
    storage.publish(uri, content.getvalue())
    fetched: list[int] = []
    call = S3FileSystem._call_s3

    async def count_bytes(self: S3FileSystem, method: str, *rest: Any, **more: Any) -> Any:
        if method == "get_object":
            first, last = more["Range"].removeprefix("bytes=").split("-")
            fetched.append(int(last) + 1 - int(first))
        return await call(self, method, *rest, **more)

    monkeypatch.setattr(S3FileSystem, "_call_s3", count_bytes)
    (rows,) = image_rows([uri], CategoryRule("nut"))
    assert len(rows) == count
    assert sum(fetched) < 0.2 * count * size
    # The same row of the output, for a page: one request more, of its own bytes.
    requests = len(fetched)
    row = make_output(count, **{name: rows[name] for name in ("uri", "archive_start", "archive_length")}).to_pylist()[7]
    assert image_files.read(ImageRef.of_row(row)) == noise
    assert fetched[requests:] == [size]


def test_a_benchmark_writes_to_s3_and_a_fit_reuses_its_models(s3: dict[str, str]) -> None:
    data, out = "s3://bucket/data sets/one", "s3a://bucket/runs/a"
    models = f"{out}/models/seed-0"
    make_category(data, "nut")
    make_category(data, "grey", grey=True, kind="JPEG")
    recipe = ["--data", data, "--epochs", "2", "--checkpoint-seconds", "0", *TINY_RECIPE]
    process = run_job("benchmark", "--out", out, *recipe)
    assert process.returncode == 0

    report = json.loads(storage.read(f"{out}/report.json"))
    assert set(report["categories"]) == {"nut", "grey"}
    assert all(values["pixel_auroc"] is not None for values in report["categories"].values())
    assert ModelStore(models).load("nut").record.category == "nut"
    rows = open_rows(RunOutput.named(out, "seed-0")).to_table().to_pylist()
    rows = [row for row in rows if row["category"] == "nut"]
    assert len(rows) == 8
    assert all(row["uri"].startswith(f"{data}/nut/test/") for row in rows)
    assert all(storage.read(f"{out}/{row['heatmap']}").startswith(b"\x89PNG") for row in rows)
    assert not [uri for uri in storage.files(models) if "checkpoint" in uri or ".train" in uri]

    first = storage.files(f"{models}/nut"), storage.read(f"{models}/nut/current.json")
    again = call_job("fit", "--models", models, *recipe)
    assert again.returncode == 0
    assert again.stdout.count("is there already") == 2
    assert (storage.files(f"{models}/nut"), storage.read(f"{models}/nut/current.json")) == first

    written = b"".join(storage.read(uri) for uri in storage.files(out) if uri.endswith((".json", ".parquet")))
    options = ["--models", models, "--category", "nut"]
    for images, run in ((f"{data}/nut/test", "s3://nobucket/run"), ("s3://nobucket/images", f"{out}/other")):
        no_bucket = call_job("score", *options, "--images", images, "--out", run)
        assert no_bucket.returncode == 1
        assert len(no_bucket.stderr.splitlines()) == 1
        assert "s3://nobucket/" in no_bucket.stderr

    for secret in (s3["AWS_ACCESS_KEY_ID"], s3["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in process.stdout + process.stderr
        assert secret.encode() not in written
