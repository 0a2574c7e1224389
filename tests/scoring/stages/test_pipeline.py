"""Images through all stages, as plain functions."""

import dataclasses
import os
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from stpm import storage
from stpm.data import mvtec
from stpm.method.arithmetic import Arithmetic
from stpm.method.preprocessing import Resize
from stpm.options import Backend, Size
from stpm.scoring.inputs.manifest import labelled_rows
from stpm.scoring.progress import BatchReport
from stpm.scoring.schema import DECODED, OUTPUT, SCORED
from stpm.scoring.stages.decode import Decode
from tests.conftest import MODELS
from tests.datasets import encode_image, make_category, with_column
from tests.scoring.stages.helpers import PREPROCESSING, decode, fit, manifest, nut_rows, score, scorer, write_heatmaps
from tests.test_storage import Flaky
from tests.test_storage import flaky as flaky  # noqa: PLC0414  a fixture


def test_each_stage_keeps_its_schema_and_the_users_columns(run: Path, tmp_path: Path) -> None:
    plain = manifest(run)
    rows = plain.append_column("line", pa.array([f"line {i}" for i in range(plain.num_rows)]))
    # Times that no Python object can hold.
    rows = rows.append_column("at", pa.array([2**60] * rows.num_rows, pa.timestamp("s")))
    decoded = decode(rows)
    scored = scorer(run, overlays=True)(decoded)
    out = write_heatmaps(scored, tmp_path)
    for table, schema in ((decoded, DECODED), (scored, SCORED), (out, OUTPUT)):
        assert table.schema.names == [*schema.names, "line", "at"]
        assert table.select(schema.names).schema.equals(schema)
    assert all(field.metadata[b"description"] for field in OUTPUT)
    assert out["at"].equals(rows["at"])
    lines = dict(zip(rows["uri"].to_pylist(), rows["line"].to_pylist(), strict=True))
    assert all(lines[row["uri"]] == row["line"] for row in out.select(["uri", "line"]).to_pylist())


def test_unreadable_images_and_odd_names_become_rows_with_an_error_and_spoil_no_other(
    run: Path, tmp_path: Path
) -> None:
    good = manifest(run)["uri"][0].as_py()
    (tmp_path / "cut.jpg").write_bytes(storage.read(good)[:-100])
    (tmp_path / "dot.png").write_bytes(encode_image(np.full((1, 1, 3), 9, np.uint8)))
    for name in ("secret", "pre::fix.png", "good.png"):
        shutil.copy(good, tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(100 * 2**30)
    Image.new("RGB", (9, 9)).save(tmp_path / "page.eps.png", "EPS")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("empty.png"))
        archive.add(good, "good.png")
    with tarfile.open(tmp_path / "a.tar") as archive:
        member = archive.getmember("good.png")
    expected = {
        "secret::z.png": "missing",
        "pre::fix.png": "",
        "a\0b.png": "bad_name",
        "nosuch://a.png": "bad_name",
        "memory://gone::file://z.png": "missing",
        f"{'long' * 100}.png": "missing",
        "folder.png": "missing",
        "pipe.png": "missing",
        "round.png": "missing",
        "huge.png": "too_large",
        "page.eps.png": "not_an_image",
        "a.tar#empty.png": "empty",
        "a.tar#good.png": "",
        "cut.jpg": "damaged",
        "good.png": "",
        "dot.png": "",
        "secret": "no_model",
    }
    uris = [name if "://" in name else f"{tmp_path}/{name}" for name in expected]
    positions = {"a.tar#empty.png": (512, 0), "a.tar#good.png": (member.offset_data, member.size)}
    rows = nut_rows(uris, [positions.get(name, (0, -1)) for name in expected])
    rows = with_column(rows, "category", [*["nut"] * (len(uris) - 1), "no/such\nmodel"])
    out = write_heatmaps(score(run, rows), tmp_path / "out").to_pylist()
    assert {name: row["error_kind"] for name, row in zip(expected, out, strict=True)} == expected
    for row in out:
        failed = bool(row["error_kind"])
        assert bool(row["error_message"]) == failed
        assert (row["score"] is None) == failed
        assert (row["model_id"] == "") == failed
        assert (row["heatmap"] == "") == failed
    # A tar member has the same score as its file.
    scores = {name: (row["score"], row["bytes"]) for name, row in zip(expected, out, strict=True)}
    assert scores["a.tar#good.png"] == scores["good.png"]


@pytest.mark.parametrize(
    "error", [PermissionError("no"), OSError("503"), RuntimeError("a client's bug"), UnicodeError("\udcff")]
)
def test_images_that_storage_failed_are_left_to_the_next_run(
    run: Path, flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    flaky.errors = [error] * 9
    monkeypatch.setattr("stpm.storage.retries.MAX_SECONDS", 0.0)
    good = manifest(run)["uri"].to_pylist()[:3]
    uris = [good[0], "flaky://a.png", *good[1:], "/gone.png"]
    reports: list[Any] = []

    def report(batch: BatchReport) -> None:
        done, left = batch.statistics, [image[:2] for image in batch.unfinished]
        counts = (done.images, done.openvino_images, done.errors, batch.attempted, len(batch.external_errors))
        reports.append((batch.stage, *counts, left))

    decoded = Decode(PREPROCESSING, progress=cast(Any, SimpleNamespace(report=report)))(nut_rows(uris))
    assert decoded["error_kind"].to_pylist() == ["", "unreadable", "", "", "missing"]
    backends: tuple[Backend, ...] = ("pytorch", "openvino")
    for backend, accept_errors, expected in zip(backends, (False, True), ([*good, "/gone.png"], uris), strict=True):
        progress: Any = SimpleNamespace(report=report)
        stage = scorer(run, progress, arithmetic=Arithmetic(backend), accept_errors=accept_errors)
        assert stage(decoded)["uri"].to_pylist() == expected
    # Each stage counts only its own failures.
    assert reports == [
        ("decode", 0, 0, 0, 5, 2, []),
        ("score", 5, 0, 2, 3, 0, [("flaky://a.png", "unreadable")]),
        ("score", 5, 3, 2, 3, 0, []),
    ]


@pytest.mark.parametrize(
    ("kind", "resize", "shape"),
    [*((kind, "fit", (19, 48)) for kind in MODELS), *(("two views", name, (64, 48)) for name in ("crop", "stretch"))],
)
def test_images_of_other_proportions_are_unpadded(
    tmp_path: Path, kind: str, resize: Resize, shape: tuple[int, int]
) -> None:
    """Images of 80 × 32 in an input of 64 × 48, height by width."""
    make_category(str(tmp_path / "data"), "long", shape=(32, 80))
    recipe = dataclasses.replace(MODELS[kind], size=Size("64x48"), resize=resize)
    record = fit(tmp_path, "long", recipe)
    preprocessing = {"long": record.preprocessing}
    (rows,) = labelled_rows([mvtec.read_category(str(tmp_path / "data"), "long")])
    scored = scorer(tmp_path, raw_maps=True, overlays=True)(Decode(preprocessing)(rows))
    out = write_heatmaps(scored, tmp_path, overlays=True, preprocessing=preprocessing).to_pylist()
    # A crop of the input's proportions is the middle 24 of 80 columns.
    left, across = (28, 24) if resize == "crop" else (0, 80)
    for row in out:
        assert row["error_kind"] == ""
        with Image.open(tmp_path / row["heatmap"]) as image:
            assert image.size == shape[::-1]
            levels = np.asarray(image)
        raw = np.frombuffer(row["anomaly_map"], np.float32).reshape(shape)
        np.testing.assert_array_equal(levels, record.heatmap_scale.apply(raw))
        highest = np.sort(raw.ravel())[-max(round(recipe.top_fraction * raw.size), 1) :]
        assert row["score"] == pytest.approx(highest.mean(), rel=1e-6)
        assert row["area"] == pytest.approx((raw > np.float32(row["pixel_threshold"])).mean())
        y, x = np.unravel_index(raw.argmax(), raw.shape)
        expected = left + int((x + 0.5) * across / 48), int((y + 0.5) * 32 / shape[0])
        assert (row["peak_x"], row["peak_y"]) == expected
        with Image.open(tmp_path / row["overlay"]) as image:
            assert image.size[0] / image.size[1] == pytest.approx(across / 32, rel=0.03)
