"""Images through all stages, as plain functions."""

import dataclasses
import io
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
from stpm.models.store import ModelStore
from stpm.options import Backend, Size
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.manifest import BLOCK_ROWS, Shard, labelled_rows
from stpm.scoring.inputs.manifest_blocks import ManifestBlocks
from stpm.scoring.inputs.sources import image_rows
from stpm.scoring.progress import BatchReport
from stpm.scoring.schema import DECODED, MANIFEST, OUTPUT, SCORED
from stpm.scoring.stages.decode import Decode
from tests.conftest import MODELS, record_calls
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


def test_unreadable_images_become_rows_with_an_error(run: Path, tmp_path: Path) -> None:
    good = storage.read(manifest(run)["uri"][0].as_py())
    contents = {"empty.png": b"", "text.png": b"hello", "cut.jpg": good[: len(good) // 2]}
    contents["deep.png"] = encode_image(np.full((9, 9), 40_000, np.uint16))
    contents["dot.png"] = encode_image(np.full((1, 1, 3), 9, np.uint8))
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    rows = nut_rows([str(tmp_path / name) for name in (*contents, "gone.png", "dot.png")])
    rows = with_column(rows, "category", [*["nut"] * 6, "no/such\nmodel"])
    out = write_heatmaps(score(run, rows), tmp_path / "out").to_pylist()
    assert [row["error_kind"] for row in out] == ["empty", "not_an_image", "damaged", "", "", "missing", "no_model"]
    for row in out:
        failed = bool(row["error_kind"])
        assert bool(row["error_message"]) == failed
        assert (row["score"] is None) == failed
        assert (row["model_id"] == "") == failed
        assert (row["heatmap"] == "") == failed
    assert [(row["width"], row["height"]) for row in out[3:5]] == [(9, 9), (1, 1)]


def test_odd_names_and_files_are_not_opened_and_spoil_no_other(run: Path, tmp_path: Path) -> None:
    good = manifest(run)["uri"][0].as_py()
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
        "good.png": "",
    }
    uris = [name if "://" in name else f"{tmp_path}/{name}" for name in expected]
    out = score(run, nut_rows(uris, [(512, 0) if "tar#" in uri else (0, -1) for uri in uris])).to_pylist()
    assert {name: row["error_kind"] for name, row in zip(expected, out, strict=True)} == expected
    assert all(row["error_message"] for row in out if row["error_kind"])


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


def test_a_model_is_not_loaded_again_for_each_block(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = record_calls(monkeypatch, ModelStore, "load")
    images = manifest(run)
    in_order_of_time = np.random.default_rng(0).integers(0, images.num_rows, 10 * BLOCK_ROWS)
    rows = images.take(in_order_of_time).set_column(0, MANIFEST.field(0), pa.array(range(10 * BLOCK_ROWS)))
    shards = [Shard(f"{tmp_path}/{start}", BLOCK_ROWS) for start in range(0, len(rows), BLOCK_ROWS)]
    for number, shard in enumerate(shards):
        storage.publish(shard.uri, storage.encode_parquet(rows.slice(number * BLOCK_ROWS, BLOCK_ROWS)))
    (task,) = ManifestBlocks(shards).get_read_tasks(1)
    (ordered,) = task.read_fn()
    # Room for one of the three models.
    score_block = scorer(run, model_ram_gib=2**-30)
    scored = [score_block(decode(ordered.slice(start, BLOCK_ROWS))) for start in range(0, len(rows), BLOCK_ROWS)]
    assert sorted(name for _, name, _ in loaded) == sorted(PREPROCESSING)
    assert sorted(id for block in scored for id in block["image_id"].to_pylist()) == list(range(len(rows)))


@pytest.mark.parametrize("filesystem", ["local", "memory"])
def test_a_tar_member_has_the_same_score_as_its_file(run: Path, tmp_path: Path, memory: str, filesystem: str) -> None:
    files = manifest(run).slice(0, 8)
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for uri in files["uri"].to_pylist():
            data = storage.read(uri)
            info = tarfile.TarInfo(f"grey/#{uri.rsplit('/', 1)[1]}" if "good" in uri else f"grey/{Path(uri).name}.jpg")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        archive.addfile(tarfile.TarInfo("grey/000.json"))
    out = f"{tmp_path if filesystem == 'local' else memory}/shards/0.tar"
    storage.publish(out, sink.getvalue())
    (members,) = image_rows([out.rsplit("/", 1)[0]], CategoryRule(pattern="{category}/{name}"))
    assert members.num_rows == 8
    assert set(members["category"].to_pylist()) == {"grey"}
    members = with_column(members, "category", files["category"].to_pylist())
    for ours, theirs in zip(score(run, members).to_pylist(), score(run, files).to_pylist(), strict=True):
        assert (ours["error_kind"], ours["bytes"]) == ("", theirs["bytes"])
        assert ours["score"] == theirs["score"]
        assert ".tar#grey/" in ours["uri"]


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
